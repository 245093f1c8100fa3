"""Copying an object to many nodes in rounds."""

from hybridrl.runtime.fan_out import rounds


def test_each_round_has_as_many_receivers_as_have_the_object_before_it():
    """With the source, 32 nodes have it after five rounds."""
    assert rounds([0, 1, 2, 3, 4]) == [[0], [1, 2], [3, 4]]
    assert [len(receivers) for receivers in rounds(range(31))] == [1, 2, 4, 8, 16]
    assert rounds([]) == []
