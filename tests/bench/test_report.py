"""The page of results: who is ahead stands first, what is wrong has no time, goals are computed,
and the page and pictures in the repository are those that the stored results make.

Records are built by hand, in the form that the suite stores; no time is measured.
"""

import json
import shutil

import pytest

from bench import record
from bench.gpu.table import FLOOR, OURS
from bench.report import ahead, exponents, goals, plots, stored
from bench.report import page as report
from bench.report.stored import Run

MIB = 2**20
QUANTILES = {"median_ms", "p20_ms", "p80_ms", "min_ms"}
SHARED = {"kind", "case", "provider", "status", "peak_bytes", "error_loss", *QUANTILES}
CASE_KEYS = SHARED | {"loss", "N", "D", "V", "trained", "mode", "ignored", "near", "head"}
CASE_KEYS |= {"error_dx", "error_dw", "floor_flops", "bytes_moved", "gradient_bytes"}
CASE_KEYS |= {"mm_share", "copy_share", "dtype", "seed", "threads"}
STEP_KEYS = SHARED | {
    "error_gradient",
    "config",
    "model",
    "tokens",
    "sequence_tokens",
    "tokens_per_s",
}


def case(provider, ms, loss="jsd", **changes):
    """A record; `ms` None: not timed; without samples, like all that have not equally many."""
    trained = loss != "push_pull"
    base = {"kind": "case", "loss": loss, "N": 1024, "D": 576, "V": 49152, "trained": trained}
    base |= {"mode": "mean", "ignored": 0.0, "near": True, "head": "SmolLM2-135M"}
    base |= {"provider": provider, "status": "right", "error_loss": 1e-7, "error_dx": 1e-6}
    base |= {"error_dw": 1e-6, "floor_flops": 2.3e11, "bytes_moved": 4.6e8, "seed": 0, "threads": 2}
    base |= {"peak_bytes": 200 * MIB, "gradient_bytes": 110 * MIB, "dtype": "float32"}
    base |= {"mm_share": 0.8, "copy_share": 0.1, **dict.fromkeys(QUANTILES, ms), **changes}
    head = "trained" if base["trained"] else "frozen"
    return {"case": f"{base['loss']} N={base['N']} {head}", **base}


def step(provider, ms, **changes):
    base = {"kind": "step", "case": "LoRA step", "provider": provider, "status": "right"}
    base |= {"config": "lora", "model": "SmolLM2-135M", "tokens": 400, "sequence_tokens": 512}
    base |= {"tokens_per_s": None if ms is None else 4e5 / ms, "peak_bytes": 900 * MIB}
    return {
        **base,
        "error_loss": 1e-7,
        "error_gradient": 1e-6,
        **dict.fromkeys(QUANTILES, ms),
        **changes,
    }


def run(*records, letter="A", suite="losses", device=None, drift=1.05, **environment):
    known = {"commit": "abcdef0123456789", "dirty": False, "by": "git", "device": device}
    known |= {"python": "3.11.7", "platform": "Linux", "processor": "Zen 9", "processors": 2}
    known |= {"threads": 2, "native": "version 0.2, avx512", "command": ["bench", "-m", "quick"]}
    known["versions"] = {"torch": "2.13.0", "trl": None}
    rates = [{"copy_bytes_per_s": 1e10 * f, "mm_flops_per_s": 1e11 * f} for f in (1, drift)]
    content = {"environment": {**known, **environment}, "ceilings": rates, "suite": suite}
    content["device"] = "cuda" if device else "cpu"
    content |= {"records": list(records), "path": f"2026-01-31-{suite}.json"}
    return Run(letter, {**content, "started_utc": "2026-01-31T12:00:00+00:00"})


def first_table(page):
    return page.split("## Goals on the CPU")[0]


def cuda_section(page):
    return page.split("## On CUDA\n")[1].split("## How to run")[0].strip()


def floor(ms=100.0, **changes):
    none = dict.fromkeys(("error_loss", "error_dx", "error_dw", "peak_bytes", "gradient_bytes"))
    return case(FLOOR, ms, **{**none, **changes})


def test_no_results():
    page = report.render([])
    assert cuda_section(page) == "not measured yet"
    assert first_table(page).strip().endswith("not measured yet")
    assert "bench/gpu.sh --dry-run" in page


def test_cpu_results_say_nothing_of_cuda():
    assert cuda_section(report.render([run(floor(), case(OURS, 110.0))])) == "not measured yet"


def test_cuda_results_take_the_place():
    device = {"name": "NVIDIA H100"}
    page = report.render([run(floor(10.0), case(OURS, 12.5), device=device)])
    assert "NVIDIA H100" in cuda_section(page)
    assert "12.5 ms" in cuda_section(page)
    assert "not measured yet" not in cuda_section(page)


def test_red_tests_and_lost_cases_stand_beside_gpu_results():
    lost = {"kind": "device lost", "case": "jsd N=8", "provider": "orda"}
    found = run(floor(10.0), lost, device={"name": "NVIDIA H100"})
    del found.content["suite"], found.content["device"]  # as the GPU script stores
    found.content["tests"] = {"red": True, "finished": True}
    text = cuda_section(report.render([found]))
    assert "kernel tests of this run are red" in text
    assert "device lost: jsd N=8 orda" in text
    assert "`bench/gpu.sh" in text


def lead_measures(*records, **options):
    return [
        (lead.measure.name, lead.others[0]["provider"])
        for lead in ahead.leads(run(*records, **options))
    ]


@pytest.mark.parametrize(
    ("changes", "measure"),
    [
        ({"ms": 104.0}, "time"),
        ({"peak_bytes": 190 * MIB}, "memory"),
        ({"error_dx": 4e-7}, "error of dX"),
        ({"error_dw": 4e-7}, "error of dW"),
    ],
)
def test_who_is_better_is_named(changes, measure):
    # ours: 110 ms, 200 MiB of which 110 are gradients, errors 1e-6
    peer = case("peer", **{"ms": 130.0, **changes})
    records = (floor(), case(OURS, 110.0), peer)
    assert lead_measures(*records) == [(measure, "peer")]
    page = first_table(report.render([run(*records)]))
    (row,) = [line for line in page.splitlines() if line.startswith("| A |")]
    assert f"| {measure} | peer |" in row


@pytest.mark.parametrize(
    "changes",
    [
        {"ms": 105.0},  # the product ceiling drifted by 5 %
        {"peak_bytes": 197 * MIB},
        {"error_dx": 6e-7},
        {"error_loss": 1e-9},  # below the last digit of an fp32 loss
        {"error_dx": 1e-9, "computes": "forward_kl"},
        {"ms": 50.0, "status": "wrong gradient"},
    ],
    ids=str,
)
def test_who_is_not_better_is_not_named(changes):
    peer = case("peer", **{"ms": 130.0, **changes})
    assert lead_measures(floor(50.0), case(OURS, 110.0), peer) == []


def sampled(provider, *samples, **changes):
    """A case with a sample a turn."""
    return case(provider, sorted(samples)[len(samples) // 2], samples_ms=samples, **changes)


@pytest.mark.parametrize(
    ("theirs", "ahead"),
    [
        ((99.0, 199.0, 99.0, 99.0, 101.0), True),  # four turns of five, however little
        ((50.0, 50.0, 50.0, 101.0, 201.0), False),
        ((99.0,) * 4, False),  # not the same number of samples: medians
        ((90.0,) * 4, True),
    ],
)
def test_turns_tell_who_is_faster(theirs, ahead):
    ours = sampled(OURS, 100.0, 200.0, 100.0, 100.0, 100.0)
    found = lead_measures(floor(), ours, sampled("peer", *theirs))
    assert found == [("time", "peer")] * ahead


@pytest.mark.parametrize(("device", "auto"), [(None, "native"), ({"name": "H100"}, "triton")])
def test_ours_is_what_auto_picks(device, auto):
    slow = case(f"{OURS}, {auto}", 150.0)
    fast = case(f"{OURS}, torch", 100.0, peak_bytes=150 * MIB)
    found = lead_measures(floor(), fast, slow, case("peer", 120.0), device=device)
    assert found == [("time", "peer")]
    assert lead_measures(floor(), case(OURS, 150.0), case("peer", 120.0)) == [("time", "peer")]


@pytest.mark.parametrize("make", [case, step])
def test_who_computes_another_loss_is_marked(make):
    changes = {"computes": "forward_kl", "peak_bytes": 150 * MIB, "error_loss": 0.0}
    records = make(OURS, 110.0), make("trl, beta 0", 50.0, **changes)
    assert [measure for measure, _ in lead_measures(*records)] == ["time", "memory"]
    page = first_table(report.render([run(*records)]))
    rows = [line for line in page.splitlines() if line.startswith("| A |")]
    assert all("| trl, beta 0 (computes forward_kl) |" in row for row in rows)


@pytest.mark.parametrize("ms", [50.0, 150.0])
def test_who_was_compared_is_named(ms):
    missing = case("orda", None, status="not installed")
    records = floor(), case(OURS, 110.0), case("peer", ms), missing, step("trl, beta 0", ms)
    page = first_table(report.render([run(*records)]))
    assert "Compared with `peer`, `trl, beta 0`." in page


def test_a_result_that_we_lack_is_a_lead():
    failed = case(OURS, None, status="failed", peak_bytes=None, error_loss=None, error_dx=None)
    failed["error_dw"] = None
    records = (floor(), failed, case("peer", 120.0))
    assert ("time", "peer") in lead_measures(*records)
    assert "no result" in first_table(report.render([run(*records)]))


def test_nowhere_is_said_in_words():
    page = first_table(report.render([run(floor(), case(OURS, 110.0), case("peer", 120.0))]))
    assert "Nowhere:" in page


def test_steps_and_scaling_count_too():
    scaling = [case(OURS, 110.0, kind="scaling"), case("eager", 50.0, kind="scaling")]
    steps = [step(OURS, 1000.0), step("eager", 900.0, peak_bytes=500 * MIB)]
    assert lead_measures(*scaling, *steps) == [
        ("time", "eager"),
        ("time", "eager"),
        ("memory", "eager"),
    ]


def test_what_is_wrong_or_missing_stands_in_place_of_the_time():
    wrong = case("trl", None, status="wrong gradient", error_dx=0.31, error_dw="nan")
    absent = case("orda", None, status="not installed", error="No module named 'orda'")
    failed = case("liger", None, status="failed", error="OSError: a|b\n/home/me/x/y.py is odd")
    page = report.render([run(floor(), case(OURS, 110.0), wrong, absent, failed)])
    rows = {line.split(" | ")[0]: line for line in page.splitlines()}
    assert "| wrong gradient: error loss 1.0e-07, dX 3.1e-01, dW nan | - |" in rows["| trl"]
    assert "| not installed | - |" in rows["| orda"]
    assert r"failed: OSError: a\|b y.py is odd" in rows["| liger"]
    assert "| 0.110 s (0.110-0.110) | 1.10 | 90.0 MiB | 110.0 MiB |" in rows[f"| **{OURS}**"]


def test_ratios_are_those_of_the_turns():
    # the machine is half as fast in the second turn, and ours takes 10 % longer in the last
    base, ours = floor(samples_ms=[100.0, 200.0, 100.0]), (100.0, 200.0, 110.0)
    found = stored.times(sampled(OURS, *ours), base)
    assert found == pytest.approx((1.0, 1.0, 1.06))
    page = report.render([run(base, sampled(OURS, *ours))])
    assert "| 0.110 s (0.110-0.110) | 1.00 (1.00-1.06) |" in page
    assert stored.times(sampled(OURS, *ours, 100.0), base) == pytest.approx((1.1,) * 3)
    steps = [step("eager", 9.0, samples_ms=[9.0]), step(OURS, 4.5, samples_ms=[4.5])]
    assert stored.times(steps[1], stored.base(steps)).middle == pytest.approx(0.5)


def test_every_table_says_where_it_is_from():
    page = report.render([run(floor(), case(OURS, 110.0), step(OURS, 1.0), dirty=True)])
    for name in ("#### jsd", "#### A whole unlearning step", "## Where others", "## Goals"):
        text = page.split(name)[1].split("\n## ")[0]
        for word in ("`pytest bench -m quick`", "abcdef012345", "dirty tree", "2026-01-31"):
            assert word in text, name
        for word in ("Zen 9", "2 threads", "torch 2.13.0"):
            assert word in text, name


def test_clean_tree_is_not_called_dirty():
    assert "dirty" not in report.caption(run(floor()))


def outcome(text, *runs):
    (found,) = [o for o in goals.outcomes(list(runs)) if o.goal.text == text]
    return found.measured and found.measured.middle, found.word


@pytest.mark.parametrize(
    ("loss", "text", "ours_ms", "measured", "word"),
    [
        ("bidirectional_kl", "KL: time over its four products", 112.0, 1.12, "met"),
        ("bidirectional_kl", "KL: time over its four products", 113.0, 1.13, "**MISSED**"),
        ("jsd", "JSD: time over its four products", 120.0, 1.20, "met"),
        ("cross_entropy", "CE: time over its three products", 112.5, 1.125, "**MISSED**"),
        (
            "push_pull",
            "push-pull, head frozen: time over its two projections",
            111.0,
            1.11,
            "**MISSED**",
        ),
    ],
)
def test_goals_over_the_floor(loss, text, ours_ms, measured, word):
    records = (floor(loss=loss), case(OURS, ours_ms, loss=loss))
    value, said = outcome(text, run(*records))
    assert value == pytest.approx(measured)
    assert said == word
    assert word in report.render([run(*records)]).split("## Goals on the CPU")[1]


@pytest.mark.parametrize(
    ("samples", "word"),
    [
        ((110.0, 115.0, 130.0), "met, within noise"),
        ((110.0, 125.0, 130.0), "**MISSED**, within noise"),
        ((124.0, 125.0, 126.0), "**MISSED**"),
    ],
)
def test_goals_within_noise(samples, word):
    records = run(floor(samples_ms=[100.0] * 3), sampled(OURS, *samples))
    text = "JSD: time over its four products"
    assert outcome(text, records) == (pytest.approx(samples[1] / 100), word)
    (row,) = [line for line in report.render([records]).splitlines() if text in line]
    assert f" | {word} | A |" in row
    assert "(1." in row


@pytest.mark.parametrize("status", ["wrong gradient", "failed"])
def test_goals_are_about_the_newest_run_of_a_case(status):
    old, new = run(floor(), case(OURS, 110.0)), run(floor(loss="cross_entropy"), letter="B")
    new.content["started_utc"] = "2026-02-28T12:00:00+00:00"
    text = "JSD: time over its four products"
    assert outcome(text, old, new) == (pytest.approx(1.1), "met")
    bad = case(OURS, 105.0, status=status)
    new.content["records"] += [floor(), bad]
    assert outcome(text, old, new) == (None, f"**MISSED**: {status}")
    bad |= {"status": "right", **dict.fromkeys(QUANTILES)}
    assert outcome(text, old, new) == (None, "not measured")


@pytest.mark.parametrize(("extra", "word"), [(96, "met"), (97, "**MISSED**")])
def test_goals_of_memory(extra, word):
    ours = case(OURS, 110.0, N=8192, peak_bytes=(110 + extra) * MIB)
    text = "JSD, N={}: MiB beyond inputs and gradients"
    assert outcome(text.format(8192), run(ours)) == (extra, word)
    assert outcome(text.format(1024), run(ours)) == (None, "not measured")


def test_goals_over_peers():
    ours = case(f"{OURS}, native", 100.0, peak_bytes=130 * MIB)
    eager = case("eager", 170.0, peak_bytes=290 * MIB)
    records = run(ours, eager, case("trl, beta 0.5", 190.0), case("trl", None, status="failed"))
    assert outcome("JSD: times faster than eager", records) == (pytest.approx(1.7), "met")
    assert outcome("JSD: times faster than trl", records) == (pytest.approx(1.9), "**MISSED**")
    text = "JSD: memory beyond inputs and gradients over eager's"
    assert outcome(text, records) == (pytest.approx(20 / 180), "**MISSED**")


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "bfloat16"}, {"head": "Qwen3-0.6B"}, {"mode": "no_grad"}, {"ignored": 0.15}],
    ids=str,
)
def test_goals_ask_for_their_own_case(changes):
    records = run(floor(**changes), case(OURS, 110.0, **changes))
    assert outcome("JSD: time over its four products", records) == (None, "not measured")


def test_exponents():
    def along(provider, size, power):
        at = [(2**k, 100.0 * 2 ** (power * k)) for k in range(8, 12)]
        return [case(provider, ms, kind="scaling", **{size: x}) for x, ms in at]

    found = exponents.lines([*along("eager", "N", 1), *along(OURS, "V", 0.5), case(OURS, 1.0)])
    fits = {(line.provider, line.size): exponents.fit(*line.points("ms")) for line in found}
    assert fits.keys() == {("eager", "N"), (OURS, "V")}
    assert fits["eager", "N"].exponent == pytest.approx(1)
    assert fits[OURS, "V"].exponent == pytest.approx(0.5)
    memory = exponents.fit(*found[0].points("bytes"))
    assert memory.exponent == pytest.approx(0)
    assert exponents.fit([1, 2], [1, 2]) is None
    page = report.render([run(*along("eager", "N", 1))])
    assert "| jsd | eager | N | 256 to 2048 | V=49152, D=576 | 1.00 ± 0.00 | 0.00 ± 0.00 |" in page


def everything(folder):
    """A run with pictures of all kinds, as it is stored."""
    sizes = [
        case(provider, N * factor, kind="scaling", N=N)
        for N in (64, 128, 256)
        for provider, factor in ((OURS, 1.0), ("eager", 2.0))
    ]
    wrong = case("trl", None, status="wrong gradient")
    cases = [floor(), case(OURS, 110.0), case("eager", 160.0), wrong]
    steps = [step("eager", 1000.0), step(OURS, 900.0)]
    store(folder, run(*cases, *sizes, *steps).content)
    return stored.stored_runs(folder)


def test_pictures_are_the_same_bytes_again(tmp_path):
    pytest.importorskip("matplotlib")
    runs = everything(tmp_path / "results")
    found = list(plots.plots_of(*runs))
    names = [plot.name for plot in found]
    assert names == ["2026-01-31-losses-overview.svg", "2026-01-31-losses-scaling-jsd.svg"]
    for plot in found:
        first, again = (plots.save(plot, tmp_path / which).read_bytes() for which in "ab")
        assert first == again
        assert b"<dc:date>" not in first
    page = report.render(runs)
    assert all(f"](plots/{name})" in page for name in names)


def store(folder, content):
    """Write a result file as pytest-benchmark does."""
    timed = [r for r in content["records"] if r["median_ms"] is not None]
    file = {
        key: content[key] for key in ("environment", "ceilings", "suite", "device", "started_utc")
    }
    file["machine_info"], file["commit_info"] = {}, {}
    file["benchmarks"] = [
        {"name": f"{i}", "group": r["case"], "extra_info": r, "stats": {}}
        for i, r in enumerate(timed)
    ]
    file["not_timed"] = [r for r in content["records"] if r["median_ms"] is None]
    folder.mkdir(exist_ok=True)
    path = folder / content["path"]
    path.write_text(json.dumps(file))
    return path


def test_check(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results, page = tmp_path / "results", tmp_path / "README.md"
    everything(results)
    command = ["--results", str(results), "--output", str(page)]

    def check():
        status, lines = report.main([*command, "--check"]), capsys.readouterr().out.splitlines()
        assert len(lines) == status
        return lines

    assert "python -m bench.report" in check()[0]
    report.main(command)
    capsys.readouterr()
    assert check() == []
    (tmp_path / "plots" / "2026-01-31-losses-overview.svg").rename(tmp_path / "plots" / "old.svg")
    assert "old.svg" in check()[0]
    report.main(command)
    assert not (tmp_path / "plots" / "old.svg").exists()
    capsys.readouterr()
    assert check() == []
    (path,) = results.iterdir()
    path.write_text(path.read_text() + "\n")  # the same page, but who knows which pictures
    assert "2026-01-31-losses-overview.svg" in check()[0]
    report.main(command)
    page.write_text(page.read_text().replace("eager", "Eager"))
    capsys.readouterr()
    assert "README.md" in check()[0]


def test_newest_file_of_a_suite_and_device_counts(tmp_path):
    def at(day, suite="losses", device=None):
        content = run(case(OURS, float(day)), suite=suite, device=device).content
        name = f"{day}-{suite}-{device['name'] if device else 'cpu'}.json"
        when = f"2026-01-{day:02}T12:00:00+00:00"
        path = store(tmp_path, {**content, "path": name, "started_utc": when})
        return path.name

    at(5)
    at(12, "losses-part")
    at(4, device={"name": "NVIDIA H100"})
    newest = {at(11), at(7, "steps")}
    newest |= {at(8, device={"name": "NVIDIA H100"}), at(9, device={"name": "NVIDIA H200"})}
    assert {found.path.name for found in stored.stored_runs(tmp_path)} == newest


def test_without_matplotlib_the_page_is_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    everything(tmp_path / "results")
    page = tmp_path / "README.md"
    command = ["--results", str(tmp_path / "results"), "--output", str(page)]
    assert report.main(command) == 0
    assert "no pictures" in capsys.readouterr().out
    assert "overview.svg" in page.read_text()
    shutil.rmtree(tmp_path / "results")
    assert report.main([*command, "--check"]) == 1


def test_page_of_the_repository_is_in_step(capsys):
    status = report.main(["--check"])
    assert status == 0, capsys.readouterr().out


def test_stored_records_are_whole():
    paths = list(stored.RESULTS.glob("*.json"))
    assert paths
    for path in paths:
        for one in record.load(path)["records"]:
            wanted = {"case": CASE_KEYS, "scaling": CASE_KEYS, "step": STEP_KEYS}
            missing = wanted.get(one["kind"], {"kind"}) - one.keys()
            assert not missing, f"{path.name}: {one.get('case')}, {one.get('provider')}: {missing}"


def test_shares_are_of_the_best_that_the_run_saw():
    # 2.3e11 FLOP in 110 ms; 1e11 FLOP/s before the run and 5e12 after it
    page = report.render([run(floor(), case(OURS, 110.0), drift=50.0)])
    (row,) = [line for line in page.splitlines() if line.startswith(f"| **{OURS}**")]
    assert row.endswith("| 42% | 1% |")
    assert "product 5000 GFLOP/s" in page
