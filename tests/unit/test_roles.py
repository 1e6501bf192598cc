"""Adapters on one frozen network."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hyper_sd.roles import LCM_TARGETS, LoraSpec, Role, Roles
from tests.networks import TINY_SPEC, TinyNet, randomise, tiny_batch, tiny_unet, unet_batch

ADAPTERS = ("student", "target")
STUDENT, TARGET = (("student",), ("target",))


def unet_roles(adapters: tuple[str, ...] = ADAPTERS, *, random: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Roles, Callable]:
    """Roles of the tiny UNet in `dtype`, and a call that runs it in a role on one fixed input."""
    net = tiny_unet().to(dtype)
    roles = Roles(net, TINY_SPEC, adapters)
    for seed, adapter in enumerate(adapters):
        if random:
            randomise(roles, adapter, seed=seed, scale=0.1)
    batch, t = unet_batch(range(2)), torch.tensor([20, 900])

    def run(role: Role) -> Tensor:
        with roles.use(role):
            return net(batch.x0.to(dtype), t, batch.cond[0].to(dtype)).sample

    return roles, run


def tiny_roles(adapters: tuple[str, ...] = ADAPTERS, spec: LoraSpec = TINY_SPEC) -> tuple[Roles, Callable[[Role], Tensor]]:
    net = TinyNet().double()
    roles = Roles(net, spec, adapters)
    batch, t = tiny_batch(range(2)), torch.tensor([20, 900])

    def run(role: Role) -> Tensor:
        with roles.use(role):
            return net(batch.x0, t, batch.cond)

    return roles, run


def loss_gradients(roles: Roles, run: Callable[[Role], Tensor], *, between: Role | None = None) -> dict[str, Tensor]:
    """Gradients of the student by name, with another role run between forward and backward where asked."""
    for param in roles.net.parameters():
        param.grad = None
    roles.trainable(STUDENT)
    loss = run(STUDENT).square().mean()
    if between is not None:
        with torch.no_grad():
            run(between)
    loss.backward()
    return {name: value.grad.clone() for name, value in roles.tensors("student").items() if value.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_fresh_adapters_and_the_empty_role_are_the_teacher(dtype: torch.dtype) -> None:
    batch = unet_batch(range(2))
    teacher = tiny_unet().to(dtype)(batch.x0.to(dtype), torch.tensor([20, 900]), batch.cond[0].to(dtype)).sample
    _, run = unet_roles(random=False, dtype=dtype)
    for role in ((), STUDENT, TARGET, (*STUDENT, *TARGET)):
        assert torch.equal(run(role), teacher)
    _, run = unet_roles(random=True, dtype=dtype)
    assert torch.equal(run(()), teacher)
    assert not torch.allclose(run(STUDENT), teacher)


@torch.no_grad()
def test_an_adapter_adds_alpha_over_rank_times_b_a() -> None:
    roles, run = tiny_roles(spec=LoraSpec(rank=2, alpha=3.0))
    randomise(roles, "student", seed=0)
    merged = TinyNet().double()
    for path in ("conv1", "to_q"):
        a, b = (roles.tensors("student")[f"{path}.lora_{side}.weight"].double().flatten(1) for side in "AB")
        weight = merged.get_submodule(path).weight
        weight += (1.5 * b @ a).reshape(weight.shape)
    batch = tiny_batch(range(2))
    torch.testing.assert_close(run(STUDENT), merged(batch.x0, torch.tensor([20, 900]), batch.cond), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_role_of_two_adapters_adds_both() -> None:
    roles, run = tiny_roles()
    for seed, adapter in enumerate(ADAPTERS):
        randomise(roles, adapter, seed=seed)
    base = run(())
    torch.testing.assert_close(run((*STUDENT, *TARGET)) - base, run(STUDENT) - base + run(TARGET) - base, rtol=1e-12, atol=1e-12)


def test_adapters_start_equal_and_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first, _ = tiny_roles()
    torch.manual_seed(2)
    second, _ = tiny_roles()
    other = Roles(TinyNet(), TINY_SPEC, ("student",), seed=1)
    for name, value in first.tensors("student").items():
        assert torch.equal(value, first.tensors("target")[name])
        assert torch.equal(value, second.tensors("student")[name])
        if "lora_A" in name:
            bound = value[0].numel() ** -0.5
            assert 0 < float(value.detach().abs().max()) <= bound
            assert not torch.equal(value, other.tensors("student")[name])
        else:
            assert not bool(value.any())


@torch.no_grad()
def test_use_restores_the_role_before_it_on_exit_and_on_an_exception() -> None:
    roles, run = unet_roles()
    alone = {role: run(role) for role in ((), STUDENT, TARGET)}
    with roles.use(TARGET):
        with roles.use(STUDENT):
            pass
        with pytest.raises(RuntimeError, match="inside"), roles.use(STUDENT):
            raise RuntimeError("inside")
        batch = unet_batch(range(2))
        after = roles.net(batch.x0, torch.tensor([20, 900]), batch.cond[0]).sample
    assert torch.equal(after, alone[TARGET])
    after = roles.net(batch.x0, torch.tensor([20, 900]), batch.cond[0]).sample
    assert torch.equal(after, alone[()])


def test_use_never_flips_requires_grad() -> None:
    roles, run = unet_roles()
    roles.trainable(STUDENT)

    def required() -> dict[str, bool]:
        return {name: param.requires_grad for name, param in roles.net.named_parameters()}

    before = required()
    assert sum(before.values()) == len(roles.params(STUDENT)) > 0
    with roles.use(TARGET):
        assert required() == before
        run(())
        assert required() == before
    assert required() == before


def test_trainable_is_exactly_the_role() -> None:
    roles, _ = unet_roles()
    for role in (STUDENT, TARGET, (*STUDENT, *TARGET), ()):
        roles.trainable(role)
        wanted = {id(param) for param in roles.params(role)}
        assert {id(param) for param in roles.net.parameters() if param.requires_grad} == wanted


def test_another_role_between_forward_and_backward_changes_no_gradient() -> None:
    roles, run = unet_roles()
    plain = loss_gradients(roles, run)
    assert plain.keys() == roles.tensors("student").keys() and all(bool(grad.any()) for grad in plain.values())
    for between in ((), TARGET):
        assert all(torch.equal(grad, plain[name]) for name, grad in loss_gradients(roles, run, between=between).items())


@pytest.mark.parametrize("between", [None, (), ("target",)])
def test_checkpointed_gradients_are_plain_gradients_whatever_runs_in_between(between: Role | None) -> None:
    plain = loss_gradients(*unet_roles())
    roles, run = unet_roles()
    roles.enable_gradient_checkpointing()
    found = loss_gradients(roles, run, between=between)
    assert found.keys() == plain.keys()
    assert all(torch.equal(grad, plain[name]) for name, grad in found.items())
    with torch.no_grad():
        assert torch.equal(run(()), unet_roles()[1](())), "the backward pass leaves the teacher active"


def test_checkpointing_saves_activations() -> None:
    def saved_bytes(*, checkpointing: bool) -> int:
        roles, run = unet_roles()
        if checkpointing:
            roles.enable_gradient_checkpointing()
        roles.trainable(STUDENT)
        sizes: list[int] = []

        def pack(value: Tensor) -> Tensor:
            sizes.append(value.numel() * value.element_size())
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            run(STUDENT)
        return sum(sizes)

    assert saved_bytes(checkpointing=True) < 0.5 * saved_bytes(checkpointing=False)


def test_adapters_of_a_bf16_network_are_float32_and_get_float32_gradients() -> None:
    roles, run = unet_roles(dtype=torch.bfloat16)
    assert {param.dtype for param in roles.params((*STUDENT, *TARGET))} == {torch.float32}
    roles.trainable(STUDENT)
    output = run(STUDENT)
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert {param.grad.dtype for param in roles.params(STUDENT) if param.grad is not None} == {torch.float32}
    exact, exact_run = unet_roles()
    with torch.no_grad():
        torch.testing.assert_close(output.float(), exact_run(STUDENT), rtol=0.05, atol=0.05)
    reference = loss_gradients(exact, exact_run)
    cosines = [torch.cosine_similarity(roles.tensors("student")[n].grad.flatten(), g.flatten(), dim=0) for n, g in reference.items()]
    assert min(cosines) > 0.9


def test_a_bf16_network_keeps_no_float32_activations_for_its_adapters() -> None:
    net = nn.Sequential()
    net.to_q = nn.Linear(8, 8, bias=False).bfloat16()
    roles = Roles(net, LoraSpec(rank=2, targets=("to_q",)), ("student",))
    roles.trainable(STUDENT)
    saved: list[torch.dtype] = []

    def pack(value: Tensor) -> Tensor:
        saved.append(value.dtype)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), roles.use(STUDENT):
        net.to_q(torch.ones(4, 8, dtype=torch.bfloat16))
    assert saved and set(saved) == {torch.bfloat16}


@torch.no_grad()
def test_copy_and_ema() -> None:
    roles, _ = unet_roles()
    student, target = roles.state_dict("student"), roles.state_dict("target")
    roles.ema("student", "target", 0.9)
    for name, value in roles.tensors("target").items():
        torch.testing.assert_close(value.detach(), 0.9 * target[name] + 0.1 * student[name], rtol=1e-6, atol=1e-7)
    roles.ema("student", "target", 0.0)
    assert all(torch.equal(value, student[name]) for name, value in roles.tensors("target").items())
    roles.load_state_dict("target", target)
    roles.copy("student", "target")
    assert all(torch.equal(value, student[name]) for name, value in roles.tensors("target").items())
    assert all(torch.equal(value, student[name]) for name, value in roles.tensors("student").items()), "the source stays"


@torch.no_grad()
def test_a_state_round_trips_and_is_a_copy() -> None:
    roles, run = unet_roles()
    state, output = roles.state_dict("student"), run(STUDENT)
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in state.values())
    for param in roles.params(STUDENT):
        param.zero_()
    assert all(bool(value.any()) for value in state.values())
    roles.load_state_dict("student", state)
    assert torch.equal(run(STUDENT), output)
    fresh, fresh_run = unet_roles(random=False)
    fresh.load_state_dict("student", {name: value.clone() for name, value in state.items()})
    assert torch.equal(fresh_run(STUDENT), output)


def without_one(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(state.items())[1:])


def with_another(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "elsewhere.lora_A.weight": torch.zeros(1)}


def with_another_rank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([value, value], dim=0 if "lora_A" in name else 1) for name, value in state.items()}


def with_the_last_one_misshapen(state: dict[str, Tensor]) -> dict[str, Tensor]:
    last = list(state)[-1]
    return {**state, last: state[last][:-1]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_one, "1 of its .* tensors are missing.*teacher.path and lora.targets"),
        (with_another, "1 are unknown .*elsewhere.lora_A.weight"),
        (with_another_rank, r"has shape .* expected .*check lora.rank"),
        (with_the_last_one_misshapen, r"has shape .* expected"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_copied(spoil: Callable[[dict], dict], message: str) -> None:
    roles, _ = unet_roles()
    before = roles.state_dict("student")
    other = {name: value + 1 for name, value in before.items()}
    with pytest.raises(ValueError, match=message):
        roles.load_state_dict("student", spoil(other))
    assert all(torch.equal(value, before[name]) for name, value in roles.tensors("student").items())


def test_unknown_adapters_are_named() -> None:
    roles, run = tiny_roles()
    for call in (lambda: run(("feedback",)), lambda: roles.tensors("feedback"), lambda: roles.copy("student", "feedback")):
        with pytest.raises(KeyError, match=r"feedback.*student.*target"):
            call()
    with torch.no_grad():
        assert torch.equal(run(()), TinyNet().double()(*_tiny_input())), "a refused role leaves the teacher active"


def _tiny_input() -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    batch = tiny_batch(range(2))
    return batch.x0, torch.tensor([20, 900]), batch.cond


def test_a_network_cannot_be_given_roles_twice() -> None:
    roles, _ = tiny_roles()
    with pytest.raises(ValueError, match="already has adapters"):
        Roles(roles.net, TINY_SPEC, ("other",))


def test_every_lcm_target_and_nothing_else_is_adapted() -> None:
    roles, _ = unet_roles()
    paths = {name.rsplit(".lora_", 1)[0] for name in roles.tensors("student")}
    assert {target for target in LCM_TARGETS if any(f".{path}".endswith(f".{target}") for path in paths)} == set(LCM_TARGETS)
    assert all(any(f".{path}".endswith(f".{target}") for target in LCM_TARGETS) for path in paths)
    adapted = {name for name, module in tiny_unet().named_modules() if any(f".{name}".endswith(f".{target}") for target in LCM_TARGETS)}
    assert paths == adapted
