"""What two processes check of the plain engine; started by test_plain_engine.py."""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyper_sd.config import EngineConfig, LrSchedulerConfig, OptimizerConfig
from hyper_sd.plain_engine import GradientMean, PlainEngine

SIZES = (3, 50, 7, 200, 1)
CONFIG = EngineConfig(
    gradient_checkpointing=False, accumulation=2, checkpoint_every_steps=1, checkpoint_every_seconds=None, keep_last=1, cpu_threads=1
)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, size)) for size in SIZES]


def loss(params: list[nn.Parameter], rank: int) -> Tensor:
    """Gradients arrive in the order of use, which is neither that of the parameters nor its reverse, and differs between ranks."""
    order = [2, 0, 4, 1, 3] if rank == 0 else [1, 4, 3, 0, 2]
    return sum(((rank + 1.7) * params[i] ** (i + 2)).sum() for i in order)  # pyright: ignore[reportReturnType]


def mean_of_gradients(dtype: torch.dtype, bucket_bytes: int, rank: int) -> tuple[list[Tensor], int]:
    params = parameters()
    mean = GradientMean(params, 2, dtype, bucket_bytes)
    loss(params, rank).backward(inputs=params)  # a micro-batch that is not the last: nothing leaves
    assert all(bucket.work is None for bucket in mean._buckets)
    mean.start()
    loss(params, rank).backward(inputs=params)
    assert all(bucket.work is not None for bucket in mean._buckets), "every bucket has left before the backward pass is over"
    mean.finish()
    mean.close()
    return [param.grad for param in params if param.grad is not None], mean.num_buckets


def check_means(rank: int) -> None:
    params = parameters()
    for of_rank in range(2):
        loss(params, of_rank).backward()  # the sum over two micro-batches and the mean over two processes: this sum
    expected = [param.grad for param in params if param.grad is not None]
    for bucket_bytes, num_buckets in ((1, 5), (4 * 208, 2), (10**6, 1)):
        found, number = mean_of_gradients(torch.float32, bucket_bytes, rank)
        assert number == num_buckets, (bucket_bytes, number)
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(expected, found, strict=True))
    rounded, _ = mean_of_gradients(torch.bfloat16, 4 * 208, rank)
    error = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, rounded, strict=True))
    assert 1e-5 < error < 2**-7, error


def check_a_missing_gradient() -> None:
    params = parameters()
    mean = GradientMean(params, 2, torch.float32)
    mean.start()
    params[0].sum().backward()
    try:
        mean.finish()
    except AssertionError as error:
        assert "received no gradient" in str(error)
    else:
        raise AssertionError("a parameter without a gradient went unnoticed")


def check_engine(engine: PlainEngine) -> None:
    """Two processes of two micro-batches; the role that has no turn rests, and ranks that differ are found out."""
    roles = {("a",): {"a/w": nn.Parameter(torch.ones(4))}, ("b",): {"b/w": nn.Parameter(torch.ones(3))}}
    for role, params in roles.items():
        engine.train(role, params, OptimizerConfig(lr=0.1, max_grad_norm=None), LrSchedulerConfig(), 10)
    (a,), (b,) = (list(params.values()) for params in roles.values())
    engine.begin(("a",))
    for micro_batch in range(2):
        engine.backward(("a",), ((1 + engine.rank + 2 * micro_batch) * a).sum() * b.sum())
    assert engine.step(("a",)).item() == torch.full((4,), 3 * 2.5).norm().item()  # b.sum() times the mean of 1, 2, 3, 4
    assert torch.equal(b, torch.ones(3)) and b.grad is None and not torch.equal(a, torch.ones(4))
    assert engine.same([a, b])
    with torch.no_grad():
        b[0] += 1e-6 * engine.rank
    assert engine.same([a]) and not engine.same([a, b])
    moments, updates = engine.state_dict(lambda key, value: value.clone())
    assert updates == {"a": 1, "b": 0} and moments.keys() == ({"a/exp_avg/a/w", "a/exp_avg_sq/a/w"} if engine.is_main else set())


def main() -> None:
    engine = PlainEngine(CONFIG)
    assert (engine.world_size, engine.facts["backend"], engine.facts["type"]) == (2, "gloo", "plain")
    check_means(engine.rank)
    check_a_missing_gradient()
    check_engine(engine)
    dist.barrier()
    print(f"rank {engine.rank} checked everything", flush=True)
    engine.close()


if __name__ == "__main__":
    sys.exit(main())
