"""README's tables: made from rows of one machine each, those of one column from one run."""

import pytest

from flashvec.bench import embed_tables, gpu_tables, plots, report
from flashvec.bench.rows import NOT_INSTALLED, fullest_run


def embed_row(**changes):
    row = {
        "benchmark": "embed", "model": "m", "variant": "ours", "profile": "queries", "mean_tokens": 12.0,
        "tokens_per_s": 1000, "share_of_ceiling": 0.5, "repetitions": 5,
        "cpu": "Old", "instructions": "avx512", "cores": 2, "threads": 2, "torch": "2.13", "commit": "aaa",
        "date": "2026-01-01",
    }  # fmt: skip
    return {**row, **changes}


def verify_row(**changes):
    cosine = {"minimum": 1.0, "1 %": 1.0, "median": 1.0}
    return {**embed_row(dtype="float32", cosine=cosine, top10_overlap=1.0, sign_flips=0.0), **changes}


def tables(lines):
    """Each table's own lines."""
    return [block for block in "\n".join(lines).split("\n\n") if block.startswith("|")]


def test_the_newest_row_of_a_variant_counts():
    rows = [embed_row(tokens_per_s=1), embed_row(tokens_per_s=2, commit="bbb"), embed_row(profile="pages")]
    lines = embed_tables.embed_table(rows)
    assert "| ours | 2 (50%) | 1,000 (50%) |" in lines
    assert lines[-1].startswith("commits bbb, aaa, 2026-01-01")


@pytest.mark.parametrize(
    "change", [{"cpu": "New"}, {"instructions": "avx2"}, {"cores": 8}, {"threads": 1}, {"model": "another"}]
)
def test_machines_and_models_never_share_a_table(change):
    """A newer row from elsewhere neither replaces a number nor fills a gap."""
    rows = [embed_row(), embed_row(variant="peer", tokens_per_s=77)]
    other = embed_row(tokens_per_s=9999, date="2026-02-02", **change)
    first, second = tables(embed_tables.embed_table([*rows, other]))
    assert "9,999" not in first and "| ours | 1,000" in first and "| peer | 77" in first
    assert "9,999" in second and "peer" not in second
    text = "\n".join(embed_tables.embed_table([*rows, other]))
    assert [line[-10:] for line in text.split("; medians")[:-1]] == ["2026-01-01", "2026-02-02"]
    # rows of the two in turn, as two machines' files read one after the other never are
    assert tables(embed_tables.embed_table([rows[0], other, rows[1]])) == [first, second]


@pytest.mark.parametrize("change", [{"cpu": "New"}, {"instructions": "avx2"}, {"cores": 8}])
def test_fidelity_of_two_machines_stands_apart(change):
    lines = report.verify_table([verify_row(), verify_row(sign_flips=0.5, **change)])
    first, second = tables(lines)
    assert "0.00%" in first and "50.00%" in second and "50.00%" not in first
    assert sum(line.startswith("On 2 cores of") or line.startswith("On 8 cores of") for line in lines) == 2


@pytest.mark.parametrize(("make", "row"), [(embed_tables.embed_table, embed_row), (report.verify_table, verify_row)])
def test_a_new_torch_starts_the_machines_table_anew(make, row):
    """Numbers of two versions are not compared; those of the last one used on that machine stay."""
    lines = make([row(variant="left behind"), row(), row(torch="2.14", variant="new"), row(cpu="Other")])
    first, second = tables(lines)
    assert "new" in first and "ours" not in first and "left behind" not in first
    assert "ours" in second
    assert any("torch 2.14," in line for line in lines) and any("torch 2.13," in line for line in lines)


def test_a_failure_stands_until_the_variant_runs_again_there():
    failed = embed_row(variant="peer", failed="more than 5 s", profile="pages")
    rows = [embed_row(variant="peer", profile="pages"), embed_row(variant="peer"), failed]
    lines = embed_tables.embed_table(rows)
    assert "| peer | 1,000 (50%) |" in lines and lines[-1] == "Did not run: peer, pages (more than 5 s)."
    lines = embed_tables.embed_table([*rows, embed_row(variant="peer", profile="pages", tokens_per_s=3)])
    assert "| peer | 1,000 (50%) | 3 (50%) |" in lines and "Did not run" not in "\n".join(lines)


def test_texts_cut_elsewhere_are_another_column():
    """Ours on texts of up to 8,192 tokens does not stand beside peers that were given 512 of them."""
    rows = [embed_row(profile="long tail", mean_tokens=97.0, variant=name) for name in ("ours", "peer")]
    alone = embed_row(
        profile="long tail", mean_tokens=205.0, tokens_per_s=77, max_length=8192, commit="bbb", peak_mib=9
    )
    lines = embed_tables.embed_table([*rows, alone])
    assert lines[0] == "| tokens/s (share of ceiling) | long tail (97) | long tail to 8,192 (205) |"
    assert "| ours | 1,000 (50%) | 77 (50%) |" in lines and "| peer | 1,000 (50%) |  |" in lines
    same = embed_row(profile="long tail", mean_tokens=97.0, max_length=512, tokens_per_s=5, commit="bbb")
    assert len(tables(embed_tables.embed_table([*rows, same]))[0].splitlines()[0].split("|")) == 4
    assert embed_tables.embed_memory_table([*rows, alone])[0] == "| MiB at most | long tail to 8,192 (205) |"
    failed = embed_row(profile="long tail", max_length=8192, commit="bbb", variant="peer", failed="no memory")
    assert embed_tables.embed_table([*rows, alone, failed])[-1] == "Did not run: peer, long tail to 8,192 (no memory)."


@pytest.mark.parametrize("run", [{"commit": "bbb"}, {"date": "2026-02-02"}, {"run": "5"}])
def test_a_column_is_of_one_run(run):
    """What did not take turns does not stand side by side: of the runs that tried most, the last counts."""
    first = [embed_row(variant=name) for name in ("ours", "peer", "another")]
    alone, few = (
        [embed_row(variant=name, tokens_per_s=7, **run) for name in names] for names in (["ours"], ["ours", "peer"])
    )
    for later in (alone, few):
        assert embed_tables.embed_table([*first, *later]) == embed_tables.embed_table(first)
    again = [embed_row(variant=name, tokens_per_s=8, **run) for name in ("ours", "peer", "another")]
    lines = embed_tables.embed_table([*first, *again])
    assert sum("| 8 (50%) |" in line for line in lines) == 3 and "1,000" not in "\n".join(lines)
    crashed = [*again[:2], embed_row(variant="another", failed="it broke", **run)]
    lines = embed_tables.embed_table([*first, *crashed])
    assert "| ours | 8 (50%) |" in lines and lines[-1] == "Did not run: another, queries (it broke)."


def test_what_is_not_installed_hides_no_earlier_number():
    rows = [embed_row(variant="ours"), embed_row(variant="peer")]
    missing = embed_row(variant="peer", run="5", failed=NOT_INSTALLED)
    later = [embed_row(run="5", tokens_per_s=7), missing]
    assert embed_tables.embed_table([*rows, *later]) == embed_tables.embed_table(rows)
    lines = embed_tables.embed_table([*later, {**later[0], "profile": "pages"}, {**missing, "profile": "pages"}])
    assert lines[-1] == f"Did not run: peer, queries, pages ({NOT_INSTALLED})."


def test_readme_shows_usual_cuts_of_the_machine_measured_last(monkeypatch):
    rows = [embed_row(profile="passages"), embed_row(profile="passages", max_length=8192, date="2026-03-03")]
    newer = embed_row(cpu="New", date="2026-02-02")
    monkeypatch.setattr(embed_tables, "read_rows", lambda benchmark: [*rows, newer, embed_row(profile="pages")])
    assert embed_tables.readme_rows() == [newer]


def test_a_group_in_which_nothing_ran_has_no_table():
    failed = embed_row(model="typo", dtype="float32", variant="ours", failed="no such file")
    ran = embed_row(dtype="float32", variant="ours", seconds=2.0, peak_mib=1)
    for rows in ([failed], [failed, ran], [ran, failed]):
        for table in (report.start_table, embed_tables.embed_table, embed_tables.embed_memory_table):
            assert "typo" not in "\n".join(table(rows)) and len(tables(table(rows))) == len(rows) - 1


def test_peak_memory_of_rows_that_have_it():
    lines = embed_tables.embed_memory_table([embed_row(), embed_row(peak_mib=2345), embed_row(variant="b", peak_mib=1)])
    assert "| ours | 2,345 |" in lines and "| b | 1 |" in lines and lines[-2].startswith("m on 2 cores")


def test_attention_on_a_gpu_is_shown_by_lengths_beside_its_peers():
    row = {
        **embed_row(variant="flashvec", repetitions=15), "gpu": "G", "triton": "3.6", "heads": "32/8", "head_size": 128,
        "direction": "forward", "lengths": "512", "tflops": 477.2,
    }  # fmt: skip
    peer = {**row, "variant": "torch varlen_attn", "tflops": 291.4}
    older = {**row, "commit": "zzz", "tflops": 1.0}
    lines = gpu_tables.gpu_attention_table([older, row, peer])
    assert "| 512 | 477 (torch varlen 291) |  |  |  |" in lines and "| 2048 |  |  |  |  |" in lines
    assert lines[-1] == "commit aaa, 2026-01-01; medians of 15 interleaved repetitions."


def test_models_on_a_gpu_are_shown_by_their_newest_run_alone():
    shared = {"benchmark": "gpu embed", "gpu": "H100", "torch": "t", "triton": "3", "date": "d", "model": "m"}
    shared |= {"lengths": "log-normal 256", "spread": "±1%", "share_of_989": 0.5, "share_of_products": 0.8}
    rows = [
        {**shared, "commit": "old", "variant": "transformers, 65,536", "tokens_per_s": 900, "median_cosine": 1.0},
        {**shared, "commit": "new", "variant": "flashvec", "tokens_per_s": 5000, "median_cosine": 0.99999},
        {
            **shared,
            "commit": "new",
            "variant": "transformers",
            "tokens_per_s": 1000,
            "median_cosine": 1.0,
            "truth": "bfloat16",
        },
    ]
    table = "\n".join(gpu_tables.gpu_embed_table(rows))
    assert "5,000" in table and "1,000" in table and "900" not in table and "commit new" in table
    assert "| 0.99999 |" in table and "1.00000" not in table  # compared with itself


def test_training_is_shown_beside_peft_and_the_products():
    row = embed_row(
        dtype="float32", profile="sentences", over_peft=2.5, of_ceiling=0.66, step_mib=2202, tokens_per_s=238.1
    )
    lines = report.train_table([{**row, "tokens_per_s": 1.0}, row, {**row, "variant": "bare products"}])
    assert lines[2] == "| ours | 238 | 2.50 | 66% | 2,202 |" and lines[3].startswith("| bare products")
    assert lines[0].startswith("| sentences |") and len(tables(lines)[0].splitlines()) == 4


def test_starting_is_shown_quickest_first():
    rows = [embed_row(dtype="float32", variant=name, seconds=s, peak_mib=1200) for name, s in (("a", 9.0), ("b", 2.0))]
    lines = report.start_table([*rows, embed_row(dtype="float32", variant="c", failed="it broke")])
    assert lines[2:4] == ["| b | 2.0 | 1,200 |", "| a | 9.0 | 1,200 |"]
    assert lines[-1] == "Did not run: c (it broke)." and any("medians of 5" in line for line in lines)
    alone = embed_row(dtype="float32", variant="a", seconds=1.0, peak_mib=1, commit="bbb")
    assert fullest_run([*rows, alone]) == rows


@pytest.mark.parametrize("words", [[], ["--check"], ["--rerun", "--model", "m"]])
def test_an_installed_package_has_no_pages(words, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["report", *words])
    with pytest.raises(SystemExit, match=r"holds no README\.md: run it in a checkout"):
        report.main()


def test_an_unmarked_readme_stays_as_it_is():
    assert report.render("# Title\n\n| a | b |\n") == "# Title\n\n| a | b |\n"


def test_depths_stand_beside_what_was_timed_in_their_run():
    def row(variant, score, seconds, **others):
        values = {"data": "sts-dev", "score": score, "seconds": seconds, "pairs": 1500, **others}
        return embed_row(variant=variant, **values)

    trained = "trained, bidirectional, mean"
    earlier = [row(f"{trained}, 15 layers", 1.0, 1.0, date="2025-01-01"), row("other", 1.0, 1.0, date="2025-01-01")]
    own = [row(trained, 80.0, 60.0), row(f"{trained}, 15 layers", 78.0, 30.0), row("all-MiniLM-L6-v2", 86.0, 10.0)]
    apart = [row("untrained, causal, mean", 54.0, 60.0), row(trained, 69.0, 20.0, data="SICK_trial")]
    later = [row(trained, 80.0, 90.0, date="2027-01-01")]
    cuts, others = plots.depth_points([*earlier, *own, *apart, *later])
    assert cuts == [("all", 50.0, 80.0), ("15", 100.0, 78.0)] and others == [("all-MiniLM-L6-v2", 300.0, 86.0)]


def test_plots_are_those_of_the_rows():
    made = plots.render_plots()
    folder = report.ROOT / "docs" / "plots"
    assert {file.stem for file in folder.glob("*.svg")} == set(made)
    for name, svg in made.items():
        assert (folder / f"{name}.svg").read_text(encoding="utf-8") == svg, "run: python -m flashvec.bench.report"
    assert "flashvec" in made["embed"] and "torch varlen" in made["gpu_attention"]
