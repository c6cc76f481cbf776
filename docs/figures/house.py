"""Draws house.png beside this file: the map of catapult_opt, and the way of one step through it in blue.

    python docs/figures/house.py        (needs matplotlib)

The rooms are checked against the folder and the arrows against the imports before anything is drawn: a module that is
not on the map, or an import that runs upwards, is an error.
"""

from __future__ import annotations

import ast
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PACKAGE = Path(__file__).resolve().parents[2] / "catapult_opt"
# From the top: what a user types, then what that is made of. A module imports from its own floor and from below.
FLOORS: list[tuple[str, list[str]]] = [
    ("what a user types", ["optimizer", "scheduler", "monitor", "on_demand", "starting_rates", "cli", "commands"]),
    ("carry a controller, or hook on", ["controlled", "checkpoint", "step_hook"]),
    ("one controlled step", ["controller", "sgd_update"]),
    ("decide, remember, record", ["policy", "memory", "schedule", "recorder", "report", "plots"]),
    ("what a step saw", ["observer", "options", "parameters", "repetition", "summary", "sparklines", "logfiles"]),
    ("measure", ["measure", "updates", "curvature", "capture", "link", "catapults"]),
    ("run again, many processes, log", ["replay", "distributed", "criterion", "grad_scaler", "runlog"]),
    ("ground", ["vectors", "trees", "state", "checks", "runlog_format", "plain", "progress"]),
]
# Parts of a room that are not drawn as rooms of their own.
WITH = {
    "runlog_columns": "runlog",
    "runlog_reader": "runlog",
    "__main__": "cli",
}
# The way of one step: the room, and what happens there.
WAY = {
    "optimizer": "2  step()",
    "capture": "1  hooks see\nthe batch",
    "controller": "3  one controlled\nstep",
    "observer": "4  what the\nstep saw",
    "measure": "5  critical rate,\nif it is due",
    "policy": "6  decide\non the rate",
    "memory": "7  average\ncalm weights",
    "recorder": "8  count\nand log",
    "schedule": "9  when to\nmeasure next",
    "sgd_update": "10  torch's\nown update",
}


def imports() -> set[tuple[str, str]]:
    """Pairs (module, module that it imports), by the names of the rooms; imports for types alone included."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        room = _room(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and room != "__init__":
                found |= {(room, target) for target in _targets(node, path)}
    return {(a, b) for a, b in found if a != b and b != "__init__"}


def _targets(node: ast.ImportFrom, path: Path) -> list[str]:
    if node.level:
        base = path.relative_to(PACKAGE).parent.parts
        parts = (*base[: len(base) - node.level + 1], *(node.module or "").split("."))
    elif node.module and node.module.split(".")[0] == "catapult_opt":
        parts = tuple(node.module.split(".")[1:])
    else:
        return []
    parts = tuple(p for p in parts if p)
    names = [(*parts, alias.name) for alias in node.names] if not parts else [parts]
    return [_room(name) for name in names if (PACKAGE / f"{name[0]}.py").exists() or (PACKAGE / name[0]).is_dir()]


def _room(parts: tuple[str, ...]) -> str:
    return WITH.get(parts[0], parts[0])


def check() -> None:
    """An AssertionError for a module that is not on the map, and for an import that runs upwards."""
    floor_of = {room: i for i, (_, rooms) in enumerate(FLOORS) for room in rooms}
    there = {_room(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")} - {"__init__"}
    assert there == floor_of.keys(), f"not on the map: {there - floor_of.keys()}; gone: {floor_of.keys() - there}"
    upwards = sorted((a, b) for a, b in imports() if floor_of[a] > floor_of[b])
    assert not upwards, f"imports that run upwards: {upwards}"
    circles = _circles(imports())
    assert not circles, f"modules that import each other: {circles}"


def _circles(arrows: set[tuple[str, str]]) -> set[str]:
    """The rooms on a circle of imports."""
    left = set(arrows)
    while ends := {b for _, b in left} - {a for a, _ in left} | ({a for a, _ in left} - {b for _, b in left}):
        left = {(a, b) for a, b in left if a not in ends and b not in ends}
    return {room for arrow in left for room in arrow}


def draw() -> Figure:
    figure = Figure(figsize=(10.5, 7.6), layout="constrained")
    ax = figure.subplots()
    ax.set_axis_off()
    ax.set_xlim(0, 10.5)
    ax.set_ylim(0, len(FLOORS))
    for i, (title, rooms) in enumerate(FLOORS):
        y = len(FLOORS) - 1 - i
        ax.text(0, y + 0.4, title, fontsize=9.5, color="0.35", va="center")
        width = 8.0 / 7
        for k, room in enumerate(rooms):
            x = 2.5 + k * width
            colour, edge = ("#dcebf7", "tab:blue") if room in WAY else ("#f4f4f4", "0.7")
            ax.add_patch(
                FancyBboxPatch((x, y + 0.06), width - 0.14, 0.68, boxstyle="round,pad=0.02", fc=colour, ec=edge)
            )
            middle = x + width / 2 - 0.07
            top = y + (0.6 if room in WAY else 0.4)
            ax.text(middle, top, room, ha="center", va="center", fontsize=8, family="monospace")
            ax.text(middle, y + 0.3, WAY.get(room, ""), ha="center", va="center", fontsize=7.5, color="tab:blue")
    return figure


if __name__ == "__main__":
    check()
    draw().savefig(Path(__file__).with_suffix(".png"), dpi=130)
