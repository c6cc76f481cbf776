"""The printed critical rates against candidate settings: a verdict that can hold and fail."""

import pytest

from catapult_opt.analysis.reproduce.printed_rates import ARTEFACTS, CANDIDATES, PRINTED

(CRITICAL,) = ARTEFACTS


def records(rates):
    """Made up: the rates of (printed name, candidate), the printed rate times 3 where nothing is given."""
    return [
        {
            "case": {"rate": name, "seed": seed},
            "result": {
                "bound": 3.2,
                **{candidate: rates.get((name, candidate), 3 * printed) * (1 + seed / 100) for candidate in CANDIDATES},
            },
        }
        for name, (printed, _) in PRINTED.items()
        for seed in range(2)
    ]


@pytest.mark.parametrize(
    ("chosen", "outcome"),
    [
        (lambda name: [list(CANDIDATES)[1]], "holds"),
        (lambda name: [list(CANDIDATES)[1 if name.startswith("FCN") else 2]], "holds in part"),
        (lambda name: [list(CANDIDATES)[1]] if name.startswith("FCN") else [], "holds in part"),
        (lambda name: [], "fails"),
    ],
)
def test_it_holds_if_one_setting_gives_all(chosen, outcome):
    rates = {(name, candidate): PRINTED[name][0] for name in PRINTED for candidate in chosen(name)}
    assert CRITICAL.judge({}, records(rates)).outcome == outcome


def test_the_bound_without_biases_is_said():
    assert "less than 3.2/q = 3.20" in CRITICAL.judge({}, records({})).measured
