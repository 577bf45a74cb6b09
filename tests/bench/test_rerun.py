import pytest

from flashvec.bench import bench_embed, rerun
from flashvec.bench.embed_tables import readme_rows
from flashvec.bench.rerun import CEILING, Claim, claims_of, lines, outcomes


def row(variant, rate, share=0.5, profile="passages"):
    return {"variant": variant, "profile": profile, "tokens_per_s": rate, "share_of_ceiling": share}


README = [
    row("flashvec float32", 800, 0.8),
    row("flashvec bfloat16", 1600, 0.7),
    row("hugging face bfloat16, sorted", 400),
]


def test_claims_are_ours_to_the_ceiling_and_to_peers_of_the_same_dtype():
    assert claims_of([*README, row("st float32", 200), row("st float32", 100, profile="pages")]) == [
        Claim("passages", "flashvec float32", CEILING, 0.8),
        Claim("passages", "flashvec float32", "st float32", 4.0),
        Claim("passages", "flashvec bfloat16", CEILING, 0.7),
        Claim("passages", "flashvec bfloat16", "hugging face bfloat16, sorted", 4.0),
    ]


@pytest.mark.parametrize(("rate", "holds"), [(1600, True), (1370, True), (1350, False), (9000, True)])
def test_a_ratio_may_be_better_or_a_little_worse(rate, holds):
    here = [row("flashvec bfloat16", rate, 0.7), row("hugging face bfloat16, sorted", 400)]
    found = outcomes(claims_of(README), here)
    by_name = {(o.claim.ours, o.claim.other): o for o in found}
    assert by_name["flashvec float32", CEILING].here is None
    assert by_name["flashvec bfloat16", "hugging face bfloat16, sorted"].holds is holds
    text = "\n".join(lines(found))
    assert ("DOES NOT HOLD" in text) is not holds and "not measured here" in text
    assert text.endswith(f"{1 + holds} of 2 ratios hold within 15%; 1 not measured")


def test_what_readme_shows_is_measured_again(monkeypatch, capsys):
    claimed = readme_rows()
    asked = []

    def run(subject, texts, profiles, repetitions, *, has_peers):
        asked.extend(profiles)
        yield from ([each for each in claimed if each["profile"] == profile] for profile in profiles)

    monkeypatch.setattr(bench_embed, "run", run)
    assert rerun.rerun(claimed, "model", None, 1)
    assert asked == ["passages", "queries", "sentences"] and "0 not measured" in capsys.readouterr().out
    slow = [
        dict(each, tokens_per_s=1, share_of_ceiling=0.01) if "flashvec" in each["variant"] else each for each in claimed
    ]
    monkeypatch.setattr(bench_embed, "run", lambda *args, **settings: [slow])
    assert not rerun.rerun(claimed, "model", None, 1)
    monkeypatch.setattr(bench_embed, "run", lambda *args, **settings: [[]])
    with pytest.raises(ValueError, match="none of README's ratios can be measured here"):
        rerun.rerun(claimed, "model", None, 1)
