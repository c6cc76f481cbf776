"""The runner: resumes, never mixes settings, judges both ways, says what is missing; `catapult-opt reproduce`."""

import doctest
import importlib
import json
import sys

import pytest
import torch

from catapult_opt.analysis import reproduce as package
from catapult_opt.analysis.reproduce import command as commands
from catapult_opt.analysis.reproduce import recorded, results_page, runner
from catapult_opt.analysis.reproduce.artefact import SCALES, Artefact, Verdict, mean_sd
from catapult_opt.analysis.reproduce.store import Results, ResultsError
from catapult_opt.cli import main

SETTING = {"width": 4, "seeds": 3}


def halves(setting, records):
    values = [record["result"]["value"] for record in records]
    assert all("curves" not in record["result"] for record in records)
    outcome = "holds" if all(v < 0.5 for v in values) else "fails"
    return Verdict(outcome, mean_sd(values), "of [random] numbers")


def made_up(calls=None, name="fig-1.1", run=None, **changes):
    def random_number(setting, case, data):
        if calls is not None:
            calls.append(case["seed"])
        return {"value": float(torch.rand(())) / setting["width"], "curves": {"long": [0.0] * 1000}}

    fields = {
        "title": "Random numbers",
        "source": "Figure 1.1",
        "claim": "They are below one half.",
        "printed": "0.1",
        "scales": {"quick": {**SETTING, "seeds": 1}, "recorded": SETTING, "full": {**SETTING, "width": 1}},
        "cases": lambda setting: [{"seed": seed} for seed in range(setting["seeds"])],
        "run": run or random_number,
        "judge": halves,
        "draw": lambda records, figure: figure.subplots().plot(records[0]["result"]["curves"]["long"]),
    }
    return Artefact(name=name, **{**fields, **changes})


@pytest.fixture
def registry(monkeypatch):
    def register(*artefacts):
        monkeypatch.setattr(package, "ARTEFACTS", artefacts)
        monkeypatch.setattr(commands, "ARTEFACTS", artefacts)

    return register


# --------------------------------------------------------------------------------------------------------- the runner


def test_a_run_leaves_results_verdict_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    done = runner.reproduce(made_up(), tmp_path)
    assert done.verdict.outcome == "holds"
    assert done.picture.read_bytes().startswith(b"\x89PNG")
    header, *lines = (tmp_path / "fig-1.1" / "results.jsonl").read_text().splitlines()
    assert json.loads(header)["setting"] == {"width": 4}
    assert [json.loads(line)["case"] for line in lines] == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    verdict = json.loads((tmp_path / "fig-1.1" / "verdict.json").read_text())
    assert (verdict["outcome"], verdict["command"]) == ("holds", "catapult-opt reproduce fig-1.1")


def test_resuming_runs_the_missing_cases_only_and_gives_the_same_results(tmp_path):
    whole = runner.reproduce(made_up(), tmp_path / "whole").records
    calls = []

    def stopped(setting, case, data):
        if case["seed"] == 1:
            raise KeyboardInterrupt
        return made_up().run(setting, case, data)

    with pytest.raises(KeyboardInterrupt):
        runner.reproduce(made_up(run=stopped), tmp_path / "parts")
    again = runner.reproduce(made_up(calls), tmp_path / "parts").records
    assert calls == [1, 2]
    assert [r["result"] for r in again] == [r["result"] for r in whole]


def test_seeds_are_added_and_taken_away_without_running_again(tmp_path):
    calls = []
    runner.reproduce(made_up(calls), tmp_path, seeds=2)
    assert len(runner.reproduce(made_up(calls), tmp_path, seeds=4).records) == 4
    assert len(runner.reproduce(made_up(calls), tmp_path, seeds=1).records) == 1
    assert calls == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:-1], lambda b: b + b'{"case": 3}\n'])
def test_a_line_that_was_cut_off_is_run_again(tmp_path, damage, capsys):
    whole = runner.reproduce(made_up(), tmp_path).records
    path = tmp_path / "fig-1.1" / "results.jsonl"
    data = path.read_bytes()
    path.write_bytes(damage(data))
    again = runner.reproduce(made_up(), tmp_path).records
    assert [r["result"] for r in again] == [r["result"] for r in whole]
    assert len(path.read_bytes().splitlines()) == 4
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_another_setting_is_refused_and_the_difference_named(tmp_path):
    runner.reproduce(made_up(), tmp_path)
    before = (tmp_path / "fig-1.1" / "results.jsonl").read_bytes()
    with pytest.raises(ResultsError, match=r"another setting \(width 4 there, 1 here\)"):
        runner.reproduce(made_up(), tmp_path, scale="full")
    assert (tmp_path / "fig-1.1" / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", ["", "not json\n", '{"format": "other"}\n', "[1]\n"])
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(ResultsError, match="is not a results file"):
        Results(path, made_up(), SETTING)


def test_non_finite_results_survive_the_disk(tmp_path):
    artefact = made_up(run=lambda *_: {"value": float("inf"), "curves": {"long": [float("nan")]}})
    first = runner.reproduce(artefact, tmp_path).records
    second = runner.reproduce(artefact, tmp_path).records
    assert str(first) == str(second)
    assert "Infinity" in (tmp_path / "fig-1.1" / "results.jsonl").read_text()


def test_a_tensor_in_a_result_is_an_error_that_says_where(tmp_path):
    artefact = made_up(run=lambda *_: {"value": [torch.zeros(2)]})
    with pytest.raises(TypeError, match=r"record\['result'\]\['value'\]\[...\] is a Tensor"):
        runner.reproduce(artefact, tmp_path)


def test_results_are_shared_with_another_artefact(tmp_path):
    calls = []
    owner = made_up(calls)
    other = made_up(calls, name="table-1.1", shares="fig-1.1", cases=lambda setting: [{"seed": 0}], run=owner.run)
    runner.reproduce(other, tmp_path)
    runner.reproduce(owner, tmp_path)
    assert calls == [0, 1, 2]
    assert (tmp_path / "table-1.1" / "verdict.json").exists()


def test_without_matplotlib_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert runner.reproduce(made_up(), tmp_path).picture is None
    assert "pip install 'catapult_opt[plot]'" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- declarations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Figure 4.9"}, "name must look like"),
        ({"scales": {"quick": SETTING}}, "scales must be quick, recorded, full, got quick"),
        ({"scales": {scale: {"width": 1} for scale in SCALES}}, "needs seeds of at least 1"),
    ],
)
def test_bad_declarations(changes, message):
    with pytest.raises(ValueError, match=message):
        made_up(**changes)


def test_every_artefact_makes_distinct_cases_of_plain_values_with_a_seed():
    names = [artefact.name for artefact in package.ARTEFACTS]
    assert len(set(names)) == len(names)
    for artefact in package.ARTEFACTS:
        for setting in artefact.scales.values():
            cases = artefact.cases(setting)
            assert {case["seed"] for case in cases} == set(range(setting["seeds"])), artefact.name
            keys = [json.dumps(case, sort_keys=True) for case in cases]
            assert len(set(keys)) == len(keys) > 0
            json.dumps(setting)


def test_docstring_examples():
    assert doctest.testmod(importlib.import_module("catapult_opt.analysis.reproduce.artefact")).failed == 0


def test_shared_results_are_really_shared():
    known = {artefact.name: artefact for artefact in package.ARTEFACTS}
    for artefact in package.ARTEFACTS:
        if artefact.shares:
            owner = known[artefact.shares]
            assert not owner.shares
            assert owner.run is artefact.run
            for scale, setting in artefact.scales.items():
                assert owner.scales[scale] == setting


def test_the_recorded_results_of_the_repository_are_of_the_declared_settings_and_in_results_md(request):
    folder = request.config.rootpath / "analysis"
    found = recorded.read(folder / "results", package.ARTEFACTS)
    assert {path.stem for path in (folder / "results").glob("*.json")} == {one.artefact.name for one in found}
    for one in found:
        declared = {**one.artefact.scales[one.scale], "seeds": one.setting["seeds"]}
        assert one.setting == json.loads(json.dumps(declared)), one.artefact.name
        assert [record["case"] for record in one.records] == one.artefact.cases(one.setting)
    assert (folder / "RESULTS.md").read_text(encoding="utf-8") == results_page.markdown(found, package.ARTEFACTS)


# ---------------------------------------------------------------------------------------------------- the command line


def test_list_names_every_artefact(capsys):
    assert main(["reproduce", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(artefact.name in out for artefact in package.ARTEFACTS)


def test_command_prints_the_verdict_and_fails_with_status_1(tmp_path, registry, capsys):
    registry(made_up(), made_up(name="fig-1.2", run=lambda *_: {"value": 0.9, "curves": {"long": [1.0]}}))
    assert main(["reproduce", "Figure 1.1", "--out", str(tmp_path)]) == 0
    assert "of [random] numbers" in capsys.readouterr().out
    assert main(["reproduce", "all", "--out", str(tmp_path), "--seeds", "1"]) == 1
    out = capsys.readouterr().out
    assert "holds" in out and "fails" in out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["fig-1.11"], "no artefact is called 'fig-1.11'; did you mean fig-1.1?"),
        (["nonsense"], "no artefact is called 'nonsense'"),
        ([], "name an artefact, or `all`"),
        (["--results", "--into", "/does/not/exist"], "no such folder"),
    ],
)
def test_what_cannot_be_run_is_named(arguments, why, registry, capsys):
    registry(made_up())
    assert main(["reproduce", *arguments]) == 2
    captured = capsys.readouterr()
    assert why in captured.err and captured.out == ""


def test_a_missing_data_set_is_named_and_the_way_to_it(tmp_path, registry, capsys):
    registry(made_up(run=lambda setting, case, data: {"value": len(data.load("cifar10"))}))
    assert main(["reproduce", "fig-1.1", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "CIFAR-10" in err and "--data DIR" in err


def test_interruption_says_how_to_go_on(tmp_path, registry, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    registry(made_up(run=interrupted))
    assert main(["reproduce", "fig-1.1", "--out", str(tmp_path)]) == 130
    assert "The same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["0", "-1", "two", "1.5"])
def test_bad_seeds(seeds, capsys):
    with pytest.raises(SystemExit):
        main(["reproduce", "fig-1.1", "--seeds", seeds])
    assert f"must be a whole number of at least 1, got {seeds!r}" in capsys.readouterr().err


def test_results_md_is_written_from_what_was_recorded(tmp_path, registry, capsys):
    artefacts = made_up(), made_up(name="fig-1.2"), made_up(name="fig-1.3")
    registry(*artefacts)
    out, into = tmp_path / "out", tmp_path / "analysis"
    into.mkdir()
    runner.reproduce(artefacts[0], out)
    runner.reproduce(artefacts[1], out, scale="quick")
    assert main(["reproduce", "--results", str(out), "--into", str(into)]) == 0
    assert "fig-1.2: was run with --quick" in capsys.readouterr().err
    text = (into / "RESULTS.md").read_text()
    kept = json.loads((into / "results" / "fig-1.1.json").read_text())
    assert "long" not in str(kept)
    assert len(kept["records"]) == 3
    assert "- Claim: They are below one half." in text
    assert "- Thesis: 0.1" in text
    assert "width 4 (thesis: 1)" in text
    assert "without recorded results: fig-1.2, fig-1.3" in text
    assert max(len(line) for line in text.splitlines() if line.startswith("| [")) < 200  # one short line a row
    (into / "RESULTS.md").unlink()
    assert main(["reproduce", "--results", "--into", str(into)]) == 0
    assert (into / "RESULTS.md").read_text() == text


def recorded_as(path, artefact, values, scale="recorded"):
    """A file of recorded results, made up."""
    setting = {**artefact.scales[scale], "seeds": len(values)}
    records = [
        {"case": case, "result": {"value": value}, "seconds": 1.0}
        for case, value in zip(artefact.cases(setting), values, strict=True)
    ]
    content = {"artefact": artefact.name, "scale": scale, "setting": setting, "records": records, "seconds": 2.0}
    path.write_text(json.dumps({**content, "made_with": {}}))
    return path


def test_a_verdict_that_is_not_holds_says_why_not(tmp_path):
    low, high = [0.1, 0.2], [0.9, 0.8]
    for declared, values, scale, cause in (
        ("", low, "recorded", ""),
        ("", high, "recorded", "size"),
        ("", high, "full", "does not reproduce"),
        ("setting", high, "full", "setting"),
    ):
        artefact = made_up(name="fig-4.1", cause=declared)
        one = recorded.read_one(recorded_as(tmp_path / "one.json", artefact, values, scale), [artefact])
        assert (one.verdict.outcome == "holds", one.cause) == (not cause, cause)
        text = results_page.markdown([one], [artefact])
        row = next(line for line in text.splitlines() if line.startswith("| ["))
        assert row.endswith(f"| **{one.verdict.outcome}** | {cause} |")
        heading = "stand" if not cause else "do not come out"
        assert f"1 {heading}: [fig-4.1](#fig-41){f' ({cause})' if cause else ''}." in text


def test_comparing_two_files(tmp_path, registry, capsys):
    artefact, other = made_up(), made_up(name="fig-1.2")
    registry(artefact, other)
    a = recorded_as(tmp_path / "a.json", artefact, [0.1, 0.3])
    b = recorded_as(tmp_path / "b.json", artefact, [0.9, 0.9, 0.9])
    assert main(["reproduce", "--compare", str(a), str(b)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["verdict", "holds", "fails"] in rows
    assert ["seeds", "2", "3"] in rows
    assert ["value", "0.200", "±", "0.141", "0.900", "±", "0.000"] in rows
    assert main(["reproduce", "--compare", str(a), str(a)]) == 0
    assert "value" not in capsys.readouterr().out
    c = recorded_as(tmp_path / "c.json", other, [0.1])
    assert main(["reproduce", "--compare", str(a), str(c)]) == 2
    assert "cannot compare fig-1.1 with fig-1.2" in capsys.readouterr().err
    assert main(["reproduce", "--compare", str(a), str(tmp_path / "none.json")]) == 2
    assert "none.json: no such file" in capsys.readouterr().err
    (tmp_path / "odd.json").write_text('{"artefact": "fig-9.9", "setting": {}}')
    assert main(["reproduce", "--compare", str(a), str(tmp_path / "odd.json")]) == 2
    assert "no artefact is called 'fig-9.9'" in capsys.readouterr().err


def test_an_unfinished_run_is_not_recorded(tmp_path):
    artefact = made_up()
    runner.reproduce(artefact, tmp_path)
    path = tmp_path / "fig-1.1" / "results.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert "2 of 3 cases are done" in recorded.record(tmp_path, tmp_path / "results", [artefact])[0]
    assert recorded.read(tmp_path / "results", [artefact]) == []
