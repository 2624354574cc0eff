"""The seeds of stochastic rounding go on counting when clocks are made anew."""

from bngd_triton.clocks import Clocks


def test_a_group_that_joins_does_not_turn_the_clocks_back(device):
    def group(seed):
        return {"seed": seed, "rounding_steps": 0, "master_weights": "stochastic"}

    clocks, groups = Clocks(), [group(3)]
    clocks.wind(groups, {device})
    clocks[device].add_(5)
    groups.append(group(4))
    clocks.wind(groups, {device})
    assert clocks[device].tolist() == [(3 << 32) + 5, 4 << 32]
