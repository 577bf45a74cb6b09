"""Do README's ratios hold here: the rows of its table of speed, measured again on this machine.

    python -m flashvec.bench.report --rerun --model smollm2-encoder

Rates differ from machine to machine; what README claims are ratios: ours to another's of the same dtype, and ours to
the ceiling. Each is measured anew, in the same interleaved way, and accepted within `TOLERANCE` or where it is better.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    """A claim and what was measured here; `here` is None where it could not be."""

    claim: Claim
    here: float | None

    @property
    def holds(self) -> bool:
        """Measured, and not worse than claimed by more than the tolerance."""
        return self.here is not None and self.here >= self.claim.ratio * (1 - TOLERANCE)


def claims_of(rows: Iterable[Row]) -> list[Claim]:
    """What rows say: ours to the ceiling, and to each peer of the same dtype, profile by profile.

    Args:
        rows: of the benchmark "embed", one machine's, at most one for each variant and profile.
    """
    found = {(row["profile"], row["variant"]): row for row in rows if "failed" not in row}
    claims: list[Claim] = []
    for (profile, variant), row in found.items():
        if not variant.startswith(OURS):
            continue
        dtype = variant.removeprefix(OURS).split(",")[0]
        claims.append(Claim(profile, variant, CEILING, row["share_of_ceiling"]))
        for (other_profile, other), peer in found.items():
            if other_profile == profile and not other.startswith(OURS) and dtype in other:
                claims.append(Claim(profile, variant, other, row["tokens_per_s"] / peer["tokens_per_s"]))
    return claims


def outcomes(claimed: Sequence[Claim], measured: Iterable[Row]) -> list[Outcome]:
    """Each claim beside the same ratio of freshly measured rows."""
    here = {claim[:3]: claim.ratio for claim in claims_of(measured)}
    return [Outcome(claim, here.get(claim[:3])) for claim in claimed]


def lines(found: Sequence[Outcome]) -> list[str]:
    """A line a claim, and one that sums up."""
    made = []
    for claim, here in found:
        share = claim.other == CEILING
        shown = [f"{x:.0%}" if share else f"{x:.2f}x" for x in (claim.ratio, *(() if here is None else (here,)))]
        verdict = "not measured here" if here is None else "holds" if Outcome(claim, here).holds else "DOES NOT HOLD"
        values = f"README {shown[0]}" + (f", here {shown[1]}" if here is not None else "")
        made.append(f"{claim.profile:10} {claim.ours} to {claim.other}: {values}: {verdict}")
    measured = [outcome for outcome in found if outcome.here is not None]
    held = sum(outcome.holds for outcome in measured)
    made.append(
        f"{held} of {len(measured)} ratios hold within {TOLERANCE:.0%}; {len(found) - len(measured)} not measured"
    )
    return made


def rerun(rows: Sequence[Row], model: str, texts: Path | None, repetitions: int) -> bool:
    """Measure what `rows` claim, print it beside them; True where everything that could be measured holds.

    Raises:
        ValueError: nothing of what is claimed can be measured here.
    """
    from flashvec.bench.bench_embed import run
    from flashvec.bench.variants import Subject

    claimed = claims_of(rows)
    compared = {claim.profile for claim in claimed if claim.other != CEILING}
    measured = [
        row for done in run(Subject(model), texts, sorted(compared), repetitions, has_peers=True) for row in done
    ]
    found = outcomes([claim for claim in claimed if claim.profile in compared], measured)
    print("\n".join(lines(found)))
    if not any(outcome.here is not None for outcome in found):
        raise ValueError("none of README's ratios can be measured here: no peer is installed that it names")
    return all(outcome.holds for outcome in found if outcome.here is not None)
