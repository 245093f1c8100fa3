"""A tensor's storage is emptied and filled again, while views of it exist."""

import torch

from hybridrl.policy.device_memory import DeviceMemory

CPU = torch.device("cpu")


def test_views_of_released_memory_have_their_numbers_back_and_what_was_dropped_is_zero():
    memory = DeviceMemory(CPU)
    state = torch.tensor([1.0, 2.0, 3.0])
    view = state[1:]
    buffer = torch.tensor([4.0, 5.0])
    memory.release([state, view], [buffer])
    assert state.untyped_storage().nbytes() == buffer.untyped_storage().nbytes() == 0
    memory.acquire()
    assert view.tolist() == [2.0, 3.0] and buffer.tolist() == [0.0, 0.0]
    state[2] = 7.0
    assert view.tolist() == [2.0, 7.0], "the two still share their memory"


def test_host_memory_is_used_again_and_what_came_since_is_released_too():
    memory = DeviceMemory(CPU)
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    memory.release([first], [])
    memory.acquire()
    [host] = memory.spare
    first[0] = 9.0
    memory.release([second, first], [])
    assert [part.host is host for part in memory.released] == [False, True]
    memory.acquire()
    assert first.tolist() == [9.0, 2.0] and second.tolist() == [3.0]


def test_memory_of_another_device_stays():
    """For example the state of an optimizer that learner.offload keeps in host memory."""
    memory = DeviceMemory(torch.device("cuda"))
    state = torch.tensor([1.0])
    memory.release([state], [state])
    assert state.tolist() == [1.0] and not memory.released
