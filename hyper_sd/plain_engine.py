"""The plain engine: every process holds everything, and gradients are averaged while the backward pass goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from hyper_sd.config import EngineConfig
from hyper_sd.engine import Engine, step_where
from hyper_sd.roles import Role

BUCKET_BYTES = 25 * 2**20  # of float32 gradients; smaller buckets travel earlier, larger ones faster


class PlainEngine(Engine):
    """Data parallelism as one mean over processes of the trained adapters' gradients."""

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        self._means: dict[Role, GradientMean] = {}

    def drop_optimizers(self) -> None:
        for mean in self._means.values():
            mean.close()
        self._means.clear()
        super().drop_optimizers()

    def _start(self, role: Role, params: list[nn.Parameter], adamw: AdamW, max_grad_norm: float | None) -> Optimizer:
        if self.world_size > 1:
            dtype = torch.bfloat16 if self.config.reduce_dtype == "bf16" else torch.float32
            self._means[role] = GradientMean(params, self.world_size, dtype)
        return adamw

    def _backward(self, role: Role, loss: Tensor, *, last: bool) -> None:
        if last and role in self._means:
            self._means[role].start()
        loss.backward(inputs=list(self._trained[role].params.values()))

    def _step(self, role: Role) -> Tensor:
        trained = self._trained[role]
        if role in self._means:
            self._means[role].finish()
        limit = trained.max_grad_norm if trained.max_grad_norm is not None else float("inf")
        params = list(trained.params.values())
        norm = nn.utils.clip_grad_norm_(params, limit)
        step_where(norm.isfinite(), trained.optimizer, params)
        trained.optimizer.zero_grad(set_to_none=True)
        return norm

    def _moment(self, role: Role, param: nn.Parameter, moment: str) -> Tensor:
        return self._trained[role].optimizer.state[param][moment]

    def _load_moments(self, role: Role, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        trained = self._trained[role]
        for name, param in trained.params.items():
            state = {moment: tensors[name].to(param.device, copy=True) for moment, tensors in moments.items()}
            trained.optimizer.state[param] = {"step": torch.tensor(float(trained.updates)), **state}


@dataclass
class _Bucket:
    params: list[nn.Parameter] = field(default_factory=list)
    missing: int = 0  # gradients that have not arrived yet
    flat: Tensor | None = None
    work: dist.Work | None = None


class GradientMean:
    """The mean over processes of parameters' gradients, in buckets that leave as soon as their gradients are there.

    Between `start` and `finish` one backward pass must reach every parameter. Buckets leave in one order, the reverse of the
    parameters', whatever the order in which gradients arrive: processes that disagreed on it would mix up their sums. Sums are
    taken in `dtype`, the mean in float32.
    """

    def __init__(self, params: Sequence[nn.Parameter], num_processes: int, dtype: torch.dtype, bucket_bytes: int = BUCKET_BYTES):
        self._num_processes, self._dtype = num_processes, dtype
        self._buckets, self._bucket_of = [_Bucket()], {}
        size = 0
        for param in reversed(params):
            if size and size + 4 * param.numel() > bucket_bytes:
                self._buckets.append(_Bucket())
                size = 0
            self._buckets[-1].params.append(param)
            self._bucket_of[param] = self._buckets[-1]
            size += 4 * param.numel()
        self._next = len(self._buckets)  # the bucket that leaves next; all have left, or none is wanted
        self._hooks = [param.register_post_accumulate_grad_hook(self._arrived) for param in params]

    @property
    def num_buckets(self) -> int:
        return len(self._buckets)

    def start(self) -> None:
        """The next backward pass is the last before the update."""
        self._next = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.params)

    def finish(self) -> None:
        """Put the means in the place of the gradients."""
        assert self._next == len(self._buckets), "a trained adapter received no gradient: the objective's loss does not depend on all of it"
        for bucket in self._buckets:
            assert bucket.work is not None and bucket.flat is not None
            bucket.work.wait()
            mean = bucket.flat.float() / self._num_processes
            for param, piece in zip(bucket.params, mean.split([p.numel() for p in bucket.params]), strict=True):
                param.grad = piece.view_as(param)
            bucket.flat = bucket.work = None

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _arrived(self, param: nn.Parameter) -> None:
        if self._next == len(self._buckets):
            return
        self._bucket_of[param].missing -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._leave(self._buckets[self._next])
            self._next += 1

    def _leave(self, bucket: _Bucket) -> None:
        gradients = [param.grad for param in bucket.params if param.grad is not None]
        bucket.flat = torch.cat([gradient.flatten().to(self._dtype) for gradient in gradients])
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)
