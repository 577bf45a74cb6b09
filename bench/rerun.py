"""Do README's ratios hold here: the rows of its table of speed, measured again on this machine.

    python -m flashvec.bench.report --rerun --model smollm2-encoder --gguf model.gguf

Rates differ from machine to machine; what README claims are ratios: ours to each other's, of the same dtype where it
has ours, and ours to the ceiling. Each is measured anew, in the same interleaved way, and accepted within `TOLERANCE`
or where it is better. What is not installed here, or has no hardware, is not measured; what is installed must run.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flashvec.bench.rows import NOT_INSTALLED

if TYPE_CHECKING:
    from flashvec.bench.variants import Subject

Row = dict[str, Any]

TOLERANCE = 0.15
OURS = "flashvec "
CEILING = "its ceiling"


class Claim(NamedTuple):
    """Ours over another's rate, texts of one length profile."""

    profile: str
    ours: str
    other: str
    ratio: float


class Outcome(NamedTuple):
    """A claim and what was measured here, None where it could not be; `failed` says how what is installed failed."""

    claim: Claim
    here: float | None
    failed: str = ""

    @property
    def holds(self) -> bool:
        """Measured, and not worse than claimed by more than the tolerance."""
        return self.here is not None and self.here >= self.claim.ratio * (1 - TOLERANCE)

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.here is not None:
            return "holds" if self.holds else "DOES NOT HOLD"
        return f"FAILED here ({self.failed})" if self.failed else "not measured here"


def claims_of(rows: Iterable[Row]) -> list[Claim]:
    """What rows say: ours to the ceiling and to each peer, profile by profile.

    A peer in a dtype that ours ran in, too, is compared with ours of that dtype; one of other weights, such as int8,
    with the first of ours, which has the machine's own dtype.

    Args:
        rows: of the benchmark "embed", one machine's, at most one for each variant and profile.
    """
    timed = [row for row in rows if "failed" not in row]
    claims: list[Claim] = []
    for profile in dict.fromkeys(row["profile"] for row in timed):
        found = {row["variant"]: row for row in timed if row["profile"] == profile}
        own = {name: name.removeprefix(OURS).split(",")[0] for name in found if name.startswith(OURS)}
        claims += [Claim(profile, name, CEILING, found[name]["share_of_ceiling"]) for name in own]
        for other in (name for name in found if name not in own):
            same = [name for name, dtype in own.items() if dtype in other] or list(own)[:1]
            rate = found[other]["tokens_per_s"]
            claims += [Claim(profile, name, other, found[name]["tokens_per_s"] / rate) for name in same]
    return claims


def outcomes(claimed: Sequence[Claim], measured: Sequence[Row]) -> list[Outcome]:
    """Each claim beside the same ratio of freshly measured rows."""
    found = {(row["profile"], row["variant"]): row for row in measured}
    made = []
    for claim in claimed:
        ours, other = (found.get((claim.profile, name), {}) for name in (claim.ours, claim.other))
        here = None
        if "tokens_per_s" in ours:
            if claim.other == CEILING:
                here = ours["share_of_ceiling"]
            elif "tokens_per_s" in other:
                here = ours["tokens_per_s"] / other["tokens_per_s"]
        why = other.get("failed", "")
        made.append(Outcome(claim, here, "" if why == NOT_INSTALLED else why))
    return made


def lines(found: Sequence[Outcome]) -> list[str]:
    """A line a claim, and one that sums up."""
    made = []
    for outcome in found:
        claim, here = outcome.claim, outcome.here
        share = claim.other == CEILING
        shown = [f"{x:.0%}" if share else f"{x:.2f}x" for x in (claim.ratio, *(() if here is None else (here,)))]
        values = f"README {shown[0]}" + (f", here {shown[1]}" if here is not None else "")
        made.append(f"{claim.profile:10} {claim.ours} to {claim.other}: {values}: {outcome.verdict}")
    measured = [outcome for outcome in found if outcome.here is not None]
    held, failed = sum(outcome.holds for outcome in measured), sum(bool(outcome.failed) for outcome in found)
    made.append(
        f"{held} of {len(measured)} ratios hold within {TOLERANCE:.0%}; {len(found) - len(measured)} not measured"
        + (f", {failed} of them of peers that are installed and failed" if failed else "")
    )
    return made


def rerun(rows: Sequence[Row], subject: "Subject", texts: Path | None, repetitions: int) -> bool:
    """Measure what `rows` claim, print it beside them; True where all that is installed ran and holds.

    Raises:
        ValueError: nothing of what is claimed can be measured here.
    """
    from flashvec.bench.bench_embed import run

    claimed = claims_of(rows)
    profiles = sorted({claim.profile for claim in claimed if claim.other != CEILING})
    measured = [row for done in run(subject, texts, profiles, repetitions, has_peers=True) for row in done]
    found = outcomes([claim for claim in claimed if claim.profile in profiles], measured)
    print("\n".join(lines(found)))
    if not any(outcome.here is not None for outcome in found):
        raise ValueError("none of README's ratios can be measured here: no peer is installed that it names")
    return all(outcome.holds for outcome in found if outcome.here is not None) and not any(o.failed for o in found)
