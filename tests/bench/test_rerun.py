import pytest

from flashvec.bench import bench_embed, report, rerun
from flashvec.bench.embed_tables import readme_rows
from flashvec.bench.rerun import CEILING, Claim, claims_of, lines, outcomes
from flashvec.bench.rows import NOT_INSTALLED
from flashvec.bench.variants import Subject


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
        Claim("passages", "flashvec bfloat16", CEILING, 0.7),
        Claim("passages", "flashvec bfloat16", "hugging face bfloat16, sorted", 4.0),
        Claim("passages", "flashvec float32", "st float32", 4.0),
    ]


def test_peers_of_other_weights_are_claimed_beside_the_first_of_ours():
    others = [row("onnx runtime int8, sorted", 1000), row("llama.cpp, Q4_1 weights", 200)]
    assert claims_of([*README[::-1], *others])[-2:] == [
        Claim("passages", "flashvec bfloat16", "onnx runtime int8, sorted", 1.6),
        Claim("passages", "flashvec bfloat16", "llama.cpp, Q4_1 weights", 8.0),
    ]


def test_claims_of_a_machine_without_bf16_are_measured_on_one_that_has_it():
    int8 = row("onnx runtime int8, sorted", 1000)
    claimed = claims_of([README[0], int8])
    assert [outcome.here for outcome in outcomes(claimed, [README[1], README[0], int8])] == [0.8, 0.8]


def test_every_line_of_readme_is_claimed():
    rows = [row for row in readme_rows() if "failed" not in row]
    shown = {(row["profile"], row["variant"]) for row in rows if not row["variant"].startswith("flashvec")}
    claimed = {(claim.profile, claim.other) for claim in claims_of(readme_rows()) if claim.other != CEILING}
    assert shown == claimed and any("int8" in name for _, name in claimed)


@pytest.mark.parametrize(("why", "fails"), [("it broke", True), (NOT_INSTALLED, False)])
def test_a_peer_that_is_installed_and_fails_is_not_passed_over(why, fails, monkeypatch, capsys):
    failed = {"variant": README[2]["variant"], "profile": "passages", "failed": why}
    claimed = [*README, row("onnx runtime int8, sorted", 1000)]
    monkeypatch.setattr(bench_embed, "run", lambda *args, **settings: [[*README[:2], failed, claimed[-1]]])
    assert rerun.rerun(claimed, Subject("model"), None, 1) is not fails
    out = capsys.readouterr().out
    assert "1 not measured" in out and ("FAILED here (it broke)" in out) is fails
    assert ("of peers that are installed and failed" in out) is fails


def test_a_model_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--rerun", "--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"report: .*none: no such file or folder"):
        report.main()


def test_the_gguf_file_is_handed_on(monkeypatch):
    asked = []
    monkeypatch.setattr(report, "rerun", lambda rows, subject, texts, repetitions: asked.append(subject) or True)
    monkeypatch.setattr("sys.argv", ["x", "--rerun", "--model", "m", "--gguf", "m.Q4_1.gguf"])
    with pytest.raises(SystemExit) as stopped:
        report.main()
    assert stopped.value.code == 0 and "llama.cpp, Q4_1 weights" in asked[0].peers("float32")


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
    assert rerun.rerun(claimed, Subject("model"), None, 1)
    assert asked == ["passages", "queries", "sentences"] and "0 not measured" in capsys.readouterr().out
    slow = [
        dict(each, tokens_per_s=1, share_of_ceiling=0.01) if "flashvec" in each["variant"] else each for each in claimed
    ]
    monkeypatch.setattr(bench_embed, "run", lambda *args, **settings: [slow])
    assert not rerun.rerun(claimed, Subject("model"), None, 1)
    monkeypatch.setattr(bench_embed, "run", lambda *args, **settings: [[]])
    with pytest.raises(ValueError, match="none of README's ratios can be measured here"):
        rerun.rerun(claimed, Subject("model"), None, 1)
