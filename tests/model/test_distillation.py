"""The distillation losses in blocks against the ones that build every logit."""

import functools
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from model.distillation import Distilled, Kind, distillation_losses
from model.vocab_loss import token_losses
from sharding.mesh import DeviceMesh
from tests.oracle_cases import FAST_COMPILE

T, D, E, V = 11, 6, 9, 37
KINDS = get_args(Kind)


class Case(NamedTuple):
    """What the losses are of; two cotangents last."""

    hidden: Any
    head: Any
    teacher_hidden: Any
    teacher_head: Any
    targets: Any
    d_cross_entropy: Any
    d_divergence: Any


def random_case(vocabulary: int = V) -> Case:
    rng = np.random.default_rng(0)
    return Case(
        hidden=rng.normal(size=(T, D)),
        head=rng.normal(size=(D, vocabulary)),
        teacher_hidden=rng.normal(size=(T, E)),
        teacher_head=rng.normal(size=(E, vocabulary)),
        targets=rng.integers(0, vocabulary, T),
        d_cross_entropy=rng.normal(size=T),
        d_divergence=rng.normal(size=T),
    )


def of_logits(student: Any, teacher: Any) -> Case:
    """These logits, in float32, to the bit; target 1."""
    rng = np.random.default_rng(0)
    student, teacher = np.asarray(student, np.float32), np.asarray(teacher, np.float32)
    one = np.eye(student.shape[1], dtype=np.float32)
    targets, d = np.ones(len(student), int), rng.normal(size=(2, len(student))).astype(np.float32)
    return Case(student, one, teacher, one, targets, *d)


def full(case: Case, kind: str, temperature: float) -> Distilled:
    """Every probability, and the formulas."""
    student, teacher = case.hidden @ case.head, case.teacher_hidden @ case.teacher_head
    log_p, log_q = (jax.nn.log_softmax(logits / temperature) for logits in (teacher, student))
    log_m = jnp.logaddexp(log_p, log_q) - np.log(2)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    divergence = {
        "forward": jnp.sum(p * (log_p - log_q), axis=1),
        "reverse": jnp.sum(q * (log_q - log_p), axis=1),
        "jensen_shannon": (jnp.sum(p * (log_p - log_m), axis=1) + jnp.sum(q * (log_q - log_m), axis=1)) / 2,
    }[kind]
    log_teacher, each = jax.nn.log_softmax(teacher), jnp.arange(len(case.targets))
    return Distilled(
        -jax.nn.log_softmax(student)[each, case.targets],
        temperature**2 * divergence,
        log_teacher[each, case.targets],
        -jnp.sum(jnp.exp(log_teacher) * log_teacher, axis=1),
        jnp.argmax(teacher, axis=1) == case.targets,
    )


def blocks(case: Case, kind: Any, temperature: float, block: int = 5, **options: Any) -> Distilled:
    return distillation_losses(*case[:5], kind=kind, temperature=temperature, block=block, **options)


def compiled(function: Any, case: Case) -> Any:
    return jax.jit(function, compiler_options=FAST_COMPILE)(jax.tree.map(jnp.asarray, case))


def with_gradient(losses: Any, case: Case) -> Any:
    """Losses, and the gradients of the student's hidden state and head."""

    def total(hidden: Any, head: Any) -> Any:
        told = losses(case._replace(hidden=hidden, head=head))
        return jnp.sum(case.d_cross_entropy * told[0] + case.d_divergence * told[1]), told

    gradient, told = jax.grad(total, argnums=(0, 1), has_aux=True)(case.hidden, case.head)
    return told, gradient


def found_of(case: Case, kind: Kind, temperature: float, block: int = 5) -> Any:
    losses = functools.partial(blocks, kind=kind, temperature=temperature, block=block)
    return compiled(functools.partial(with_gradient, losses), case)


def expected_of(case: Case, kind: Kind, temperature: float) -> Any:
    """In float64."""
    with jax.enable_x64(True):
        case = Case(*(jnp.asarray(np.asarray(array, int if array.dtype.kind == "i" else float)) for array in case))
        return with_gradient(functools.partial(full, kind=kind, temperature=temperature), case)


def assert_close(found: Any, expected: Any, rtol: float, atol: float) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "block"), [(0.5, 5), (1.0, 36), (8.0, 100)])
def test_values_and_gradients_equal_the_full_computation(kind: Kind, temperature: float, block: int) -> None:
    with jax.enable_x64(True):
        found = found_of(random_case(), kind, temperature, block)
        assert {array.dtype for array in jax.tree.leaves(found)} == {jnp.dtype(float), jnp.dtype(bool)}
    assert_close(found, expected_of(random_case(), kind, temperature), rtol=1e-12, atol=1e-13)


def test_cross_entropy_is_that_of_training_without_a_teacher() -> None:
    with jax.enable_x64(True):
        case = random_case()._replace(d_divergence=np.zeros(T))
        told, gradient = found_of(case, "forward", 2.0)

        def total(hidden: Any, head: Any) -> Any:
            losses = token_losses(hidden, head, jnp.asarray(case.targets), 4)
            return jnp.sum(case.d_cross_entropy * losses), losses

        expected, losses = jax.grad(total, argnums=(0, 1), has_aux=True)(*map(jnp.asarray, case[:2]))
    assert_close((told.cross_entropy_T, gradient), (losses, expected), rtol=1e-12, atol=1e-13)


@functools.cache
def on_mesh(devices: int, others: int, kind: Kind) -> Any:
    """The vocabulary in parts; each device's losses, and gradients put together as a training step does."""
    mesh = DeviceMesh.of(jax.devices()[: devices * others], {"data": others, "tensor": devices})
    place = mesh.place

    def on_one(case: Case) -> Any:
        part_of = case._replace(  # each device computes the whole loss: its part is a share of it
            d_cross_entropy=case.d_cross_entropy / place.copies, d_divergence=case.d_divergence / place.copies
        )
        losses = functools.partial(blocks, kind=kind, temperature=2.0, block=4, place=place)
        told, (d_hidden, d_head) = with_gradient(losses, part_of)
        return jax.tree.map(lambda array: array[None], told), (jax.lax.psum(d_hidden, "tensor"), d_head)

    part = P(None, "tensor")
    specs = Case(P(), part, P(), part, P(), P(), P())
    run = jax.shard_map(
        on_one, mesh=mesh.mesh, in_specs=(specs,), out_specs=(P("tensor"), (P(), part)), check_vma=False
    )
    return jax.jit(run, compiler_options=FAST_COMPILE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("devices", "others"), [(2, 1), (4, 2)])
def test_devices_along_the_tensor_axis_compute_the_same_each_with_its_part(
    kind: Kind, devices: int, others: int
) -> None:
    with jax.enable_x64(True):
        case = random_case(40)
        told, gradient = on_mesh(devices, others, kind)(jax.tree.map(jnp.asarray, case))
    expected, expected_gradient = expected_of(case, kind, 2.0)
    for number in range(devices):
        assert_close(jax.tree.map(lambda array, n=number: array[n], told), expected, rtol=1e-12, atol=1e-13)
    assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-13)


def test_of_the_most_likely_ids_the_lowest_is_the_one() -> None:
    """In a block, across blocks, and across devices; the logits are whole numbers, exact however they are summed."""
    ties = ((3, 5), (3, 9), (19, 39), (0, 38), (7, 8))
    teacher = np.full((len(ties), 40), -2.0)
    for row, pair in zip(teacher, ties, strict=True):
        row[list(pair)] = -1.0  # below the zeros that sums begin with
    case = of_logits(np.zeros_like(teacher), teacher)
    for which in (0, 1):
        targets = np.array(ties)[:, which]
        alone = compiled(lambda case: blocks(case, "forward", 1.0, 6), case._replace(targets=targets))
        split, _ = on_mesh(4, 2, "forward")(case._replace(targets=targets))
        for correct in (alone.correct_T, *split.correct_T):
            np.testing.assert_array_equal(correct, which == 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("student", "teacher", "tolerance"), [("float32", "float32", 1e-5), ("bfloat16", "float32", 2e-2)]
)
def test_lower_precision_is_as_exact_as_its_gradients(kind: Kind, student: str, teacher: str, tolerance: float) -> None:
    case = Case(*(jnp.asarray(array) for array in random_case()))
    case = case._replace(hidden=case.hidden.astype(student), head=case.head.astype(student))
    case = case._replace(
        teacher_hidden=case.teacher_hidden.astype(teacher), teacher_head=case.teacher_head.astype(teacher)
    )
    told, gradient = found_of(case, kind, 2.0)
    assert {array.dtype for array in told[:4]} == {jnp.dtype("float32")}
    assert {array.dtype for array in gradient} == {jnp.dtype(student)}
    expected, expected_gradient = expected_of(case, kind, 2.0)
    assert_close(told, expected, rtol=1e-5, atol=1e-5)  # of the same rounded inputs
    assert_close(jax.tree.map(np.float64, gradient), expected_gradient, rtol=tolerance, atol=tolerance)


def test_the_gradient_is_accumulated_in_float32() -> None:
    """600 blocks, each of which adds less than bfloat16 can tell from what is there."""
    rng = np.random.default_rng(3)
    vocabulary = 1200
    arrays = (np.zeros((T, D)), rng.uniform(0.5, 1, (D, vocabulary)), np.zeros((T, E)), np.zeros((E, vocabulary)))
    hidden, head, *teacher = (jnp.asarray(array, jnp.bfloat16) for array in arrays)
    case = Case(hidden, head, teacher[0], teacher[1], np.zeros(T, int), np.ones(T), np.zeros(T))
    _, (d_hidden, _) = found_of(case, "forward", 1.0, 2)
    _, (expected, _) = expected_of(case, "forward", 1.0)
    np.testing.assert_allclose(np.float64(d_hidden), expected, atol=4e-3)


def extremes() -> Case:
    rng = np.random.default_rng(1)
    mild, wild = rng.normal(size=(6, V)), 1e4 * rng.normal(size=(6, V))
    peak = 1e4 * np.eye(V)[:6]
    pairs = (
        (wild, mild),
        (mild, wild),
        (wild, wild[:, ::-1]),
        (peak, np.roll(peak, 20, axis=1)),  # each certain, of another id
        (-peak, peak),
        (mild + 1e4, mild[::-1] - 1e4),  # the level is of no account
        (100 * mild, 100 * mild[::-1]),
    )
    return of_logits(*(np.concatenate(part) for part in zip(*pairs, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 8.0])
def test_extreme_logits(kind: Kind, temperature: float) -> None:
    case = extremes()
    told, (d_hidden, d_head) = found_of(case, kind, temperature, 6)
    expected, (expected_hidden, expected_head) = expected_of(case, kind, temperature)
    assert np.isfinite(d_head).all()
    assert_close(told, expected, rtol=1e-5, atol=1e-5 * max(1, temperature**2))
    np.testing.assert_allclose(d_hidden, expected_hidden, rtol=1e-5, atol=1e-4)  # from differences of 1e4
    np.testing.assert_allclose(d_head, expected_head, atol=1e-6 * temperature * np.abs(case.hidden).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind: Kind, temperature: float = 0.5) -> None:
    student = np.asarray(extremes().hidden)
    case = of_logits(student, student)._replace(d_cross_entropy=np.zeros(len(student), np.float32))
    told, (d_hidden, d_head) = found_of(case, kind, temperature, 6)
    np.testing.assert_allclose(told.divergence_T, 0, atol=1e-6 * temperature**2)
    np.testing.assert_allclose(d_hidden, 0, atol=1e-6 * temperature)
    np.testing.assert_allclose(d_head, 0, atol=1e-6 * temperature * np.abs(student).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_of_almost_equal_distributions_are_not_negative(kind: Kind) -> None:
    rng = np.random.default_rng(2)
    teacher = rng.normal(size=(200, 1000))
    student = teacher + np.repeat(np.logspace(-7, -2, 20), 10)[:, None] * rng.normal(size=teacher.shape)
    told = compiled(lambda case: blocks(case, kind, 1.0, 300), of_logits(student, teacher))
    assert np.min(told.divergence_T) > -3e-6


def test_the_teacher_has_no_gradient_nor_has_what_is_told_of_it() -> None:
    def gradients(case: Case) -> Any:
        def told(*arrays: Any) -> Distilled:
            return blocks(Case._make(arrays + case[4:]), "forward", 2.0)

        _, pull = jax.vjp(lambda *arrays: told(*arrays)[:4], *case[:4])
        zero, one = jnp.zeros(T), jnp.ones(T)
        return pull((one, one, zero, zero)), pull((zero, zero, one, one))

    of_losses, of_the_teacher = compiled(gradients, random_case())
    assert all(np.any(d_array) for d_array in of_losses[:2])
    assert not any(np.any(d_array) for d_array in (*of_losses[2:], *of_the_teacher))


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    tokens, vocabulary, block = 8192, 8100, 64  # 126 blocks, and one that overlaps

    def temporaries(losses: Any, kind: Kind) -> int:
        shapes = (tokens, D), (D, vocabulary), (tokens, E), (E, vocabulary)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)

        def total(hidden: Any, head: Any, teacher_hidden: Any, teacher_head: Any, targets: Any) -> Any:
            told = losses(Case(hidden, head, teacher_hidden, teacher_head, targets, None, None), kind, 2.0)
            return jnp.sum(told[0] + told[1])

        program = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*arrays, targets).compile()
        return program.memory_analysis().temp_size_in_bytes  # pyright: ignore

    every_logit = tokens * vocabulary * 4
    for kind in KINDS:
        assert temporaries(functools.partial(blocks, block=block), kind) < every_logit / 20
    assert temporaries(full, "forward") > every_logit  # what the measure says of logits that do exist
