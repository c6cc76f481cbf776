"""The command line as a user meets it: files in, text and exit status out."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from catapult_opt import __version__
from catapult_opt.cli import _parser, main
from catapult_opt.runlog import RunLogWriter

ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "NO_COLOR")}
COMMAND = [sys.executable, "-m", "catapult_opt"]


def write_run(path, steps=4, batch_size=5, val_loss=0.5):
    with RunLogWriter(path) as writer:
        writer.start({"name": path.stem, "face": "CatapultSGD", "settings": {}, "batch_size": batch_size})
        for t in range(1, steps + 1):
            measured = {"eta_crit": 0.2, "lambda_max": 10.0, "super_critical": False}
            writer.step({"step": t, "loss": 1 / t, "effective_lr": 0.1, **measured})
        writer.metrics(steps, {"val_loss": val_loss})
    return path


def run(*arguments, **options):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60, env=ENVIRONMENT, **options
    )


# --------------------------------------------------------------------------------------------------------- arguments


def test_version_and_help(capsys):
    for arguments, expected in ((["--version"], __version__), (["--help"], "examples:"), (["report", "-h"], "--watch")):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert expected in capsys.readouterr().out


EXAMPLE = re.compile(r"^ *catapult-opt (.*?)(?: [|>] .*|  .*| +#.*)?$", re.MULTILINE)


@pytest.mark.parametrize("command", ["", "report", "plot", "critical-lr", "reproduce"])
def test_help_states_the_exit_status_and_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert "exit status: 0" in text
    examples = EXAMPLE.findall(text[text.index("\nexamples:\n") :])
    assert len(examples) >= 2
    for example in examples:
        assert command in example
        _parser().parse_args(shlex.split(example))


def test_commands_in_the_documentation_parse():
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *root.glob("docs/**/*.md")]
    blocks = [b for page in pages for b in re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.M | re.S)]
    examples = [example for block in blocks for example in EXAMPLE.findall(block)]
    assert examples
    for example in examples:
        _parser().parse_args(shlex.split(example))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "COMMAND"),
        (["report"], "RUN"),
        (["report", "x", "--sort", "colour"], "invalid choice: 'colour'"),
        (["report", "x", "--json", "--csv"], "not allowed with"),
        (["report", "--watch", "runs"], "'runs' is not a number of seconds"),
        (["report", "x", "--watch", "0"], "not between"),
        (["report", "x", "--watch", "nan"], "not between"),
    ],
)
def test_wrong_arguments_exit_with_status_2_and_say_why(arguments, why, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert why in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- what to read


def test_report_of_files_and_folders_in_natural_order_each_run_once(tmp_path, capsys):
    ten, five = write_run(tmp_path / "b" / "batch_10.jsonl"), write_run(tmp_path / "b" / "batch_5.jsonl")
    (tmp_path / "b" / "notes.jsonl").write_text('{"somebody": "else"}\n')
    (tmp_path / "b" / "run.txt").write_text("not even that")
    assert main(["report", str(ten), str(tmp_path), "--json"]) == 0
    out = capsys.readouterr()
    assert [run["path"] for run in json.loads(out.out)] == [str(ten), str(five)]
    assert out.err == ""
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)] == ["batch_5", "batch_10"]


def test_what_cannot_be_read_is_named_and_the_rest_reported(tmp_path, capsys):
    good = write_run(tmp_path / "good.jsonl")
    newer = tmp_path / "newer.jsonl"
    newer.write_text('{"kind":"header","format":"catapult_opt-run","version":2}\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "foreign.jsonl").write_text('{"loss": 1}\n')
    (tmp_path / "folder").mkdir()
    names = ["missing.jsonl", "empty.jsonl", "foreign.jsonl", "folder"]
    bad = [str(tmp_path / name) for name in names] + [str(newer)]
    assert main(["report", str(good), *bad]) == 2
    out = capsys.readouterr()
    assert "good" in out.out
    lines = out.err.splitlines()
    assert len(lines) == 5
    for path, why in zip(
        bad, ["no such file", "empty", "not a catapult_opt run log", "no run logs", "upgrade"], strict=True
    ):
        assert any(line.startswith(f"catapult-opt: error: {path}: ") and why in line for line in lines)


def test_newer_version_and_empty_log_in_a_folder_are_errors(tmp_path, capsys):
    write_run(tmp_path / "good.jsonl")
    (tmp_path / "newer.jsonl").write_text('{"kind":"header","format":"catapult_opt-run","version":2}\n')
    (tmp_path / "empty.jsonl").touch()
    assert main(["report", str(tmp_path), "--json"]) == 2
    out = capsys.readouterr()
    assert [run["name"] for run in json.loads(out.out)] == ["good"]
    assert out.err.count("error") == 2


def test_truncated_log_is_a_warning_and_still_reported(tmp_path, capsys):
    path = write_run(tmp_path / "cut.jsonl")
    path.write_bytes(path.read_bytes()[:-5])
    assert main(["report", str(path), "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)[0]["steps"] == 4
    assert out.err.startswith(f"catapult-opt: warning: {path}: dropped line 6: truncated record")
    assert out.err.count("\n") == 1


def test_many_damaged_lines_are_few_warnings(tmp_path, capsys):
    path = write_run(tmp_path / "run.jsonl")
    path.write_bytes(path.read_bytes() + b"junk\n" * 500)
    assert main(["report", str(path), "--json"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[-1].endswith("dropped 497 more")


def test_nothing_readable_prints_no_table(tmp_path, capsys):
    assert main(["report", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().out == ""
    assert main(["report", str(tmp_path / "no"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == []


def test_sort_and_reverse(tmp_path, capsys):
    for name, value in (("a", 0.2), ("b", 0.1), ("c", 0.3)):
        write_run(tmp_path / f"{name}.jsonl", val_loss=value)

    def names(*arguments):
        assert main(["report", str(tmp_path), "--csv", *arguments]) == 0
        return [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[1:]]

    assert names() == ["a", "b", "c"]
    assert names("--sort", "best") == ["b", "a", "c"]
    assert names("--sort", "best", "--reverse") == ["c", "a", "b"]


# ------------------------------------------------------------------------------------------------- pipes and terminals


def test_pipe_gets_plain_text_at_full_width(tmp_path):
    name = "n" * 120
    done = run("report", write_run(tmp_path / f"{name}.jsonl"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert any(name in line and "val_loss" not in line and "0.500 @ 4" in line for line in done.stdout.splitlines())


@pytest.mark.parametrize("form", [(), ("--json",), ("--csv",)])
@pytest.mark.parametrize("runs", [1, 200])  # less and more than Python's buffers hold
def test_closed_pipe_is_no_error(tmp_path, form, runs):
    for number in range(runs):
        write_run(tmp_path / f"run_{number}.jsonl", steps=1)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*COMMAND, "report", tmp_path, *form], stdout=writer, stderr=subprocess.PIPE, timeout=60, env=ENVIRONMENT
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_output_that_cannot_spell_a_name(tmp_path):
    path = write_run(tmp_path / "größe.jsonl")
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    for form in ([], ["--csv"], ["--json"]):
        done = subprocess.run([*COMMAND, "report", path, *form], capture_output=True, timeout=60, env=environment)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.isascii()


def in_terminal(arguments, columns, *reactions):
    """Output and exit status of the command in a pseudo-terminal.

    A reaction is a pair: what to wait for in the output, and what to do then with the process.
    """
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "50"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    process = subprocess.Popen([*COMMAND, *arguments], stdin=child, stdout=child, stderr=child, env=environment)
    signal.signal(signal.SIGINT, before)
    os.close(child)
    guard = threading.Timer(60, process.kill)
    guard.start()
    output, reactions = b"", list(reactions)
    while chunk := read_terminal(parent):
        output += chunk
        if reactions and reactions[0][0] in output:
            reactions.pop(0)[1](process)
    guard.cancel()
    os.close(parent)
    return output.decode(), process.wait()


def read_terminal(parent):
    try:
        return os.read(parent, 65536)
    except OSError:  # Linux, once the other end is closed
        return b""


def test_terminal_of_80_columns_gets_colour_and_fits(tmp_path):
    output, status = in_terminal(["report", str(write_run(tmp_path / "batch_5.jsonl"))], 80)
    assert status == 0
    assert "\x1b[1m" in output
    assert max(len(line) for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output).splitlines()) <= 80


def test_watch_waits_for_logs_shows_them_grow_and_ends_on_ctrl_c(tmp_path):
    path = tmp_path / "later" / "run.jsonl"
    writer = RunLogWriter(path)

    def start(process):
        write_run(path, steps=7)

    def go_on(process):
        writer.start({}, resumed_at=7)
        writer.step({"step": 8, "loss": 0.1, "effective_lr": 0.1})

    def interrupt(process):
        process.send_signal(signal.SIGINT)

    reactions = [(b"no such file", start), (b"7 steps", go_on), (b"8 steps", interrupt)]
    output, status = in_terminal(["report", str(path), "--watch", "0.1"], 300, *reactions)  # wide: no message folds
    assert (status, "8 steps" in output, "Traceback" in output) == (0, True, False)


# ----------------------------------------------------------------------------------------------------- imports, plots


def test_report_imports_neither_torch_nor_matplotlib(tmp_path):
    code = (
        "import sys; from catapult_opt.cli import _parser, main; status = main(sys.argv[1:])\n"
        "print(sorted({'torch', 'matplotlib', 'scipy', 'pandas'} & sys.modules.keys()), file=sys.stderr)"
    )
    path = write_run(tmp_path / "run.jsonl")
    done = subprocess.run([sys.executable, "-c", code, "report", path], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]\n"


def test_plot_writes_a_picture_and_says_where(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out" / "picture.png"
    assert main(["plot", str(write_run(tmp_path / "run.jsonl")), "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{picture}\n"


def test_plot_names_its_picture_after_the_run(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "batch_5.jsonl")
    assert main(["plot", "runs"]) == 0
    assert (tmp_path / "batch_5.png").exists()


def test_plot_of_unwritable_or_unknown_format_is_an_error(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = write_run(tmp_path / "run.jsonl")
    for output in (tmp_path / "x.colour", path / "below.png"):
        assert main(["plot", str(path), "-o", str(output)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"catapult-opt: error: {output}: cannot be written")
        assert err.count("\n") == 1
    assert main(["plot", str(tmp_path / "missing.jsonl"), "-o", str(tmp_path / "y.png")]) == 2


def test_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "catapult_opt.plots", raising=False)
    monkeypatch.delattr("catapult_opt.plots", raising=False)
    assert main(["plot", str(write_run(tmp_path / "run.jsonl"))]) == 2
    assert "pip install 'catapult_opt[plot]'" in capsys.readouterr().err
