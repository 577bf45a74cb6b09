"""The warp-specialised candidate for long sequences (`kernels/attention_tma.py`) on a GPU: right first, then its time.

Warp specialisation has been wrong in silence before, and may hang: this part runs in a process of its own. The
candidate is judged by the criterion and by its bits when run again, then timed beside `attention` and the peers.
"""

from functools import partial
from unittest import mock

import torch
from torch import Tensor

from flashvec.bench import gpu_attention
from flashvec.bench.criterion import distance
from flashvec.bench.gpu_attention import Group, ours
from flashvec.bench.gpu_checks import Verdict, poisoned
from flashvec.bench.gpu_session import Session, describe, named
from flashvec.bench.peers_gpu import PEERS, Call, Peer
from flashvec.bench.problems import AttentionShape, Maker, Tensors, attention_tensors
from flashvec.kernels import attention_tma
from flashvec.kernels.attention import attention_reference

SHORTER = 1000  # of the candidate's own bound, so that 2,048 tokens can be timed too
CHECKED = (1001, 1, 2049, 1500, 1281)
HEADS = {128: (32, 8), 64: (32, 8), 256: (8, 4)}


def candidate(shape: AttentionShape, t: Tensors, specialize: bool) -> Call:
    """The candidate's forward."""
    schedule = shape.schedule(t["q"].device)
    q, k, v = (t[name].detach() for name in "qkv")

    def run() -> Tensor:
        with mock.patch.object(attention_tma, "SHORTER", SHORTER):
            return attention_tma.attention_tma(q, k, v, schedule, scale=shape.K**-0.5, specialize=specialize)[0]

    return Call(run, (q, k, v), lambda x: x)


def check(shape: AttentionShape, device: torch.device, dtype: torch.dtype, specialize: bool) -> Verdict:
    """Rows of sequences that the candidate takes, against the definition, twice."""
    name = f"attention tma {shape.K}{', specialised' if specialize else ''}"
    verdict = Verdict(name, str(dtype).removeprefix("torch."))
    try:
        t = attention_tensors(shape, Maker(device, dtype, shape.K))
        call, schedule = candidate(shape, t, specialize), shape.schedule(device)
        with poisoned():
            got, again = call.run(), call.run()
        same, truth = (
            attention_reference(t["q"].to(d), t["k"].to(d), t["v"].to(d), schedule, scale=shape.K**-0.5)[0]
            for d in (dtype, torch.float32)
        )
        taken = torch.cat([torch.full((n,), n > SHORTER) for n in shape.lengths]).to(device)
        found = distance(got[taken], same[taken], truth[taken])
        verdict.worst = found.error / found.allowed
        if not found.passed:
            verdict.faults.append(str(found))
        if not torch.equal(got, again):
            verdict.faults.append("other bits when run again")
    except Exception as error:  # whatever the compiler or the device says is what is asked here
        verdict.faults.append(describe(error))
    return verdict


def run(session: Session, only: str = "") -> None:
    """Checks in the order of risk, then times of what passed."""
    passed: dict[tuple[int, bool], bool] = {}
    for specialize in (False, True):
        for K, (H, G) in HEADS.items():
            for dtype in (torch.bfloat16, torch.float16):
                step = f"check tma {K} {dtype} specialised {specialize}"
                if not named(only, step) or not session.begin(step, 5):
                    continue
                verdict = check(AttentionShape(CHECKED, H, G, K), session.device, dtype, specialize)
                session.keep([verdict.row()])
                for fault in verdict.faults:
                    session.fail(f"{verdict.name} {verdict.dtype}: {fault}")
                session.settle()
                passed[K, specialize] = passed.get((K, specialize), True) and verdict.passed
    for length in (8192, 2048):
        for K in (128, 64):
            group = Group(
                AttentionShape((length,) * (gpu_attention.TOKENS // length), *HEADS[K], K), str(length), "forward"
            )
            if named(only, group.name) and session.begin(f"tma: {group.name}", 10):
                gpu_attention.time_group(session, group, who=contenders(K, passed))


def contenders(K: int, passed: dict[tuple[int, bool], bool]) -> dict[str, Peer]:
    """`attention`, the candidate's forms that are right, and the peers that need no compilation."""
    found: dict[str, Peer] = {"flashvec": ours}
    for specialize, name in ((False, "candidate tma"), (True, "candidate tma, specialised")):
        if passed.get((K, specialize)):
            found[name] = partial(candidate, specialize=specialize)
    return found | {name: peer for name, peer in PEERS.items() if "flex" not in name and "jagged" not in name}
