"""What a student loses beside its teacher, over the whole vocabulary in blocks of ids: the [T, V] logits never exist.

The softmax is summed up as blocks come (arXiv 1805.02867), and so are the divergences: each sum is kept relative to the
largest logits so far, those of a block as those of a device's part of the vocabulary.

Letters: T tokens, D and E widths of student and teacher, V vocabulary, v ids of a block.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from sharding.place import Place

ALONE = Place()
Kind = Literal["forward", "reverse", "jensen_shannon"]

LOWEST = -1e30
"""Below any logit. Finite: such an id has the probability 0, and 0 times the difference of two logits must be 0."""


class Distilled(NamedTuple):
    """Of each token, [T], in at least float32. Only the first two have a gradient, and only with respect to the student."""

    cross_entropy_T: jax.Array
    """-log softmax(student's logits)[target]."""
    divergence_T: jax.Array
    """Of the teacher's p and the student's q at `temperature`, times its square (arXiv 1503.02531), in nats."""
    target_log_prob_T: jax.Array
    """The teacher's, of the target."""
    entropy_T: jax.Array
    """Of the teacher, in nats."""
    correct_T: jax.Array
    """Whether the target is the teacher's most likely id, of several the lowest; bool."""


def distillation_losses(
    hidden_TD: jax.Array,
    head_DV: jax.Array,
    teacher_hidden_TE: jax.Array,
    teacher_head_EV: jax.Array,
    targets_T: jax.Array,
    *,
    kind: Kind,
    temperature: float,
    block: int,
    place: Place = ALONE,
) -> Distilled:
    """Losses of each token against its target and against the teacher's distribution.

    The divergence is KL(p||q) ("forward"), KL(q||p) ("reverse"), or the mean of KL(p||m) and KL(q||m) with m = (p + q) / 2
    ("jensen_shannon"). All else is at temperature 1.

    Forward and backward hold the logits of student and teacher for `block` ids and all tokens at a time: one pass over
    the vocabulary forward, two for "jensen_shannon", and one backward, which computes the logits again. On a tensor axis
    both heads are this device's parts of the vocabulary.
    """
    chex.assert_rank([hidden_TD, head_DV, teacher_hidden_TE, teacher_head_EV, targets_T], [2, 2, 2, 2, 1])
    chex.assert_equal_shape_prefix([hidden_TD, teacher_hidden_TE, targets_T], 1)
    chex.assert_equal_shape_suffix([head_DV, teacher_head_EV], 1)
    assert temperature > 0, temperature
    plan = _Plan(kind, temperature, min(block, head_DV.shape[1]), place)
    teacher = lax.stop_gradient((teacher_hidden_TE, teacher_head_EV))
    told: Any = _losses((hidden_TD, head_DV), teacher, targets_T, plan)
    return told


class _Plan(NamedTuple):
    kind: Kind
    temperature: float
    block: int
    place: Place


class _Block(NamedTuple):
    """Logits of some ids. In the last block, ids of the one before it are `LOWEST`."""

    student_Tv: jax.Array
    teacher_Tv: jax.Array
    is_target_Tv: jax.Array
    before_target_Tv: jax.Array


class _Largest(NamedTuple):
    """Logits."""

    student_T: jax.Array
    teacher_T: jax.Array
    before_target_T: jax.Array
    """The teacher's of ids lower than the target."""


class _Sums(NamedTuple):
    """Over ids. s and t are the logits of student and teacher, less the largest ones."""

    student_T: jax.Array
    """exp(s)"""
    teacher_T: jax.Array
    """exp(t)"""
    teacher_logit_T: jax.Array
    """exp(t) t"""
    soft_student_T: jax.Array
    """exp(s / temperature)"""
    soft_teacher_T: jax.Array
    """exp(t / temperature)"""
    gap_T: jax.Array
    """exp(t / temperature) (t - s), or for the reverse divergence exp(s / temperature) (s - t)."""
    target_T: jax.Array
    """The student's logit of the target as it is."""
    teacher_target_T: jax.Array


class _Saved(NamedTuple):
    """What the backward pass needs to know of each token."""

    largest: _Largest
    log_student_T: jax.Array
    """Logarithms of the sums."""
    log_soft_student_T: jax.Array
    log_soft_teacher_T: jax.Array
    mean_T: jax.Array
    """KL(q||p) or KL(q||m), without the temperature's square."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _losses(student, teacher, targets_T, plan):
    return _forward(student, teacher, targets_T, plan)[0]


def _forward(student, teacher, targets_T, plan):
    def with_block(so_far, i):
        return _together(so_far, _summed(_logits(student, teacher, targets_T, plan, i), plan), plan), None

    wide = _wide(student, teacher)
    lowest_T, zeros_T = jnp.full(targets_T.shape, LOWEST, wide), jnp.zeros(targets_T.shape, wide)
    start = _Largest(*[lowest_T] * len(_Largest._fields)), _Sums(*[zeros_T] * len(_Sums._fields))
    (here, sums), _ = lax.scan(with_block, start, _blocks(student, plan))
    largest = jax.tree.map(lambda largest_T: plan.place.largest(largest_T, "tensor"), here)
    sums = plan.place.joined(_relative(sums, here, largest, plan))

    log_teacher_T = jnp.log(sums.teacher_T)
    logs = jnp.log(sums.student_T), jnp.log(sums.soft_student_T), jnp.log(sums.soft_teacher_T)
    saved = _Saved(largest, *logs, zeros_T)
    if plan.kind == "jensen_shannon":
        teacher_T, student_T = _to_mixture(student, teacher, targets_T, plan, saved)
        divergence_T, saved = (teacher_T + student_T) / 2, saved._replace(mean_T=student_T)
    elif plan.kind == "reverse":
        mean_T = sums.gap_T / plan.temperature / sums.soft_student_T + logs[2] - logs[1]
        divergence_T, saved = mean_T, saved._replace(mean_T=mean_T)
    else:
        divergence_T = sums.gap_T / plan.temperature / sums.soft_teacher_T + logs[1] - logs[2]

    target_T = sums.teacher_target_T
    told = Distilled(
        cross_entropy_T=largest.student_T - sums.target_T + logs[0],
        divergence_T=plan.temperature**2 * divergence_T,
        target_log_prob_T=target_T - largest.teacher_T - log_teacher_T,
        entropy_T=log_teacher_T - sums.teacher_logit_T / sums.teacher_T,
        correct_T=(target_T == largest.teacher_T) & (target_T > largest.before_target_T),
    )
    return told, (student, teacher, targets_T, saved)


def _backward(plan, kept, d_told):
    student, teacher, targets_T, saved = kept
    hidden_TD, head_DV = student
    d_cross_entropy_T, d_divergence_T = plan.place.joined((d_told.cross_entropy_T, d_told.divergence_T))
    d_soft_T = plan.temperature * d_divergence_T  # temperature^2 x d (logit / temperature)
    wide, narrow = _wide(student, teacher), jnp.result_type(*student)

    def of_block(so_far, i):
        d_hidden_TD, d_head_DV = so_far
        block = _logits(student, teacher, targets_T, plan, i)
        probability_Tv = jnp.exp((block.student_Tv - saved.largest.student_T[:, None]) - saved.log_student_T[:, None])
        d_logits_Tv = d_cross_entropy_T[:, None] * (probability_Tv - block.is_target_Tv)
        d_logits_Tv += d_soft_T[:, None] * _d_divergence(block, plan, saved)
        d_logits_Tv = d_logits_Tv.astype(narrow)

        start = _start(student, plan, i)
        head_Dv = lax.dynamic_slice_in_dim(head_DV, start, plan.block, axis=1)
        d_hidden_TD += jnp.matmul(d_logits_Tv, head_Dv.T, preferred_element_type=wide)
        d_head_Dv = jnp.matmul(hidden_TD.T, d_logits_Tv, preferred_element_type=wide).astype(head_DV.dtype)
        d_head_Dv += lax.dynamic_slice_in_dim(d_head_DV, start, plan.block, axis=1)  # of ids of the block before
        return (d_hidden_TD, lax.dynamic_update_slice_in_dim(d_head_DV, d_head_Dv, start, axis=1)), None

    zeros = jnp.zeros(hidden_TD.shape, wide), jnp.zeros_like(head_DV)
    (d_hidden_TD, d_head_DV), _ = lax.scan(of_block, zeros, _blocks(student, plan))
    return (d_hidden_TD.astype(hidden_TD.dtype), d_head_DV), None, None


_losses.defvjp(_forward, _backward)


def _wide(student, teacher) -> jnp.dtype:
    return jnp.result_type(jnp.float32, *student, *teacher)


def _blocks(student, plan: _Plan) -> jax.Array:
    return jnp.arange(-(-student[1].shape[1] // plan.block))


def _start(student, plan: _Plan, i: jax.Array) -> jax.Array:
    """First id of a block; the last one overlaps the one before it."""
    return jnp.minimum(i * plan.block, student[1].shape[1] - plan.block)


def _logits(student, teacher, targets_T, plan: _Plan, i: jax.Array) -> _Block:
    start, wide = _start(student, plan, i), _wide(student, teacher)
    local_v = start + jnp.arange(plan.block)
    new_v = local_v >= i * plan.block

    def logits(hidden, head):
        accumulate = jnp.result_type(jnp.float32, hidden, head)
        part = lax.dynamic_slice_in_dim(head, start, plan.block, axis=1)
        logits_Tv = jnp.matmul(hidden, part, preferred_element_type=accumulate)
        return jnp.where(new_v, logits_Tv.astype(wide), LOWEST)

    ids_v, target_T1 = plan.place.first("tensor", student[1].shape[1]) + local_v, targets_T[:, None]
    return _Block(logits(*student), logits(*teacher), new_v & (ids_v == target_T1), ids_v < target_T1)


def _summed(block: _Block, plan: _Plan) -> tuple[_Largest, _Sums]:
    """Of one block. Jensen-Shannon takes the gap for granted, and the compiler leaves it out."""
    before_Tv = jnp.where(block.before_target_Tv, block.teacher_Tv, LOWEST)
    largest = _Largest(*(jnp.max(logits_Tv, axis=1) for logits_Tv in (block.student_Tv, block.teacher_Tv, before_Tv)))
    s_Tv, t_Tv = block.student_Tv - largest.student_T[:, None], block.teacher_Tv - largest.teacher_T[:, None]
    teacher_Tv = jnp.exp(t_Tv)
    soft_student_Tv, soft_teacher_Tv = jnp.exp(s_Tv / plan.temperature), jnp.exp(t_Tv / plan.temperature)
    reverse = plan.kind == "reverse"
    summands = _Sums(
        student_T=jnp.exp(s_Tv),
        teacher_T=teacher_Tv,
        teacher_logit_T=teacher_Tv * t_Tv,
        soft_student_T=soft_student_Tv,
        soft_teacher_T=soft_teacher_Tv,
        gap_T=soft_student_Tv * (s_Tv - t_Tv) if reverse else soft_teacher_Tv * (t_Tv - s_Tv),
        target_T=jnp.where(block.is_target_Tv, block.student_Tv, 0),
        teacher_target_T=jnp.where(block.is_target_Tv, block.teacher_Tv, 0),
    )
    return largest, jax.tree.map(lambda summand_Tv: jnp.sum(summand_Tv, axis=1), summands)


def _relative(sums: _Sums, largest: _Largest, larger: _Largest, plan: _Plan) -> _Sums:
    """Sums that are relative to `largest`, relative to others that are at least as large."""
    s_T, t_T = largest.student_T - larger.student_T, largest.teacher_T - larger.teacher_T
    soft_s_T, soft_t_T, teacher_T = jnp.exp(s_T / plan.temperature), jnp.exp(t_T / plan.temperature), jnp.exp(t_T)
    if plan.kind == "reverse":
        gap_T = soft_s_T * (sums.gap_T + sums.soft_student_T * (s_T - t_T))
    else:
        gap_T = soft_t_T * (sums.gap_T + sums.soft_teacher_T * (t_T - s_T))
    return sums._replace(
        student_T=jnp.exp(s_T) * sums.student_T,
        teacher_T=teacher_T * sums.teacher_T,
        teacher_logit_T=teacher_T * (sums.teacher_logit_T + sums.teacher_T * t_T),
        soft_student_T=soft_s_T * sums.soft_student_T,
        soft_teacher_T=soft_t_T * sums.soft_teacher_T,
        gap_T=gap_T,
    )


def _together(a: tuple[_Largest, _Sums], b: tuple[_Largest, _Sums], plan: _Plan) -> tuple[_Largest, _Sums]:
    largest = jax.tree.map(jnp.maximum, a[0], b[0])
    return largest, jax.tree.map(jnp.add, *(_relative(sums, of, largest, plan) for of, sums in (a, b)))


def _log_probabilities(block: _Block, plan: _Plan, saved: _Saved) -> tuple[jax.Array, jax.Array]:
    """log p and log q, [T, v]."""
    s_Tv = block.student_Tv - saved.largest.student_T[:, None]
    t_Tv = block.teacher_Tv - saved.largest.teacher_T[:, None]
    log_q_Tv = s_Tv / plan.temperature - saved.log_soft_student_T[:, None]
    return t_Tv / plan.temperature - saved.log_soft_teacher_T[:, None], log_q_Tv


def _over_mixture(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    """log(a / ((a + b) / 2))."""
    return math.log(2) - jnp.logaddexp(0, log_b - log_a)


def _to_mixture(student, teacher, targets_T, plan: _Plan, saved: _Saved) -> tuple[jax.Array, jax.Array]:
    """KL(p||m) and KL(q||m), [T]."""

    def with_block(so_far, i):
        block = _logits(student, teacher, targets_T, plan, i)
        log_p_Tv, log_q_Tv = _log_probabilities(block, plan, saved)
        to_teacher_T = jnp.sum(jnp.exp(log_p_Tv) * _over_mixture(log_p_Tv, log_q_Tv), axis=1)
        to_student_T = jnp.sum(jnp.exp(log_q_Tv) * _over_mixture(log_q_Tv, log_p_Tv), axis=1)
        return (so_far[0] + to_teacher_T, so_far[1] + to_student_T), None

    zeros_T = jnp.zeros_like(saved.mean_T)
    sums, _ = lax.scan(with_block, (zeros_T, zeros_T), _blocks(student, plan))
    return plan.place.joined(sums)


def _d_divergence(block: _Block, plan: _Plan, saved: _Saved) -> jax.Array:
    """Gradient of the divergence with respect to logit / temperature of the student, [T, v]."""
    log_p_Tv, log_q_Tv = _log_probabilities(block, plan, saved)
    q_Tv = jnp.exp(log_q_Tv)
    if plan.kind == "forward":
        return q_Tv - jnp.exp(log_p_Tv)
    if plan.kind == "reverse":
        return q_Tv * (log_q_Tv - log_p_Tv - saved.mean_T[:, None])
    return q_Tv * (_over_mixture(log_q_Tv, log_p_Tv) - saved.mean_T[:, None]) / 2
