import torch

from hybridrl.planning.live_internals import SEEN, LiveBytes, without_memory


def test_the_installed_torch_is_the_one_that_was_read():
    assert torch.__version__.startswith(SEEN["torch"])


def test_bytes_are_counted_while_their_tensors_exist_and_views_and_weights_are_not():
    with without_memory():
        weight = torch.ones(4)
        with LiveBytes([weight]) as live:
            first = weight + 1  # 16 bytes
            second = first * 2  # 16 bytes more
            del first
            view = second[:2]
            outer = weight.view(2, 2)
        assert (live.now, live.peak) == (16, 32)
        del second, view, outer
        assert live.now == 0


def test_a_product_keeps_its_factor_for_the_backward_pass():
    with without_memory():
        weight = torch.ones(8, 8, requires_grad=True)
        with LiveBytes([weight]) as live:
            out = torch.relu(torch.ones(2, 8) + 0) @ weight
            assert live.now == 2 * 8 * 4 * 2  # the relu's result, and the product
        del out
