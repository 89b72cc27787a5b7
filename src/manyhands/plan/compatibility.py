"""What goes together. Each rule looks at a whole plan and says in words what does not fit, or nothing.

Three kinds: choices that contradict each other, settings that their choice would ignore (an option is never
accepted and then ignored), and what is not supported yet. `check` is for everybody who makes or accepts a
plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from manyhands.config import shown
from manyhands.errors import PlanError
from manyhands.plan.choices import CHOICES
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import ChessEndgamesTask, DummyTask, FineTuned, GridsTask, LanguageModelTask

Rule = Callable[[Plan], str | None]


def check(plan: Plan, *, where: str = "plan") -> None:
    """Raises PlanError that names every combination of the plan which does not go together."""
    found = faults(plan)
    if found:
        listed = "\n".join(f"  {fault}" for fault in found)
        raise PlanError(f"{where}: {found[0]}" if len(found) == 1 else f"{where}:\n{listed}")


def faults(plan: Plan) -> tuple[str, ...]:
    """What does not go together, one sentence or two each; empty for a sound plan."""
    return tuple(fault for rule in RULES for fault in [rule(plan)] if fault) + tuple(idle_settings(plan))


# ------------------------------------------------------------------------------ not supported yet
def no_lag(plan: Plan) -> str | None:
    """Rounds that overlap (`rounds.lag` above 0) are not supported yet."""
    lag = plan.rounds.lag
    return f"'rounds.lag' is {lag}: rounds that overlap are not supported yet; expected 0." if lag else None


def no_fragments(plan: Plan) -> str | None:
    """Exchanging fragments (`rounds.fragments` above 1) is not supported yet."""
    n = plan.rounds.fragments
    return (
        f"'rounds.fragments' is {n}: exchanging fragments is not supported yet; expected 1."
        if n > 1
        else None
    )


def no_late_apply(plan: Plan) -> str | None:
    """Applying a change in the middle of local work (`rounds.apply_after_steps`) is not supported yet."""
    n = plan.rounds.apply_after_steps
    if n == 0:
        return None
    return f"'rounds.apply_after_steps' is {n}: changes are applied between rounds only, so far; expected 0."


def no_changing_buffers(plan: Plan) -> str | None:
    """`buffers` other than `refuse` are not supported yet."""
    if plan.buffers == "refuse":
        return None
    return (
        f"'buffers' is '{plan.buffers}': models whose training changes buffers are not supported yet; "
        "expected 'refuse'. Use a normalization without running statistics, such as LayerNorm or GroupNorm."
    )


def no_local_data(plan: Plan) -> str | None:
    """`data.kind: local` works with the dummy task alone, so far."""
    if plan.data.kind == "shared" or isinstance(plan.task, DummyTask):
        return None
    return (
        f"'data.kind' is 'local': no task but dummy can work on its owner's data yet, and this one is "
        f"'{plan.task.name}'; expected 'shared'."
    )


def shards_hold_samples(plan: Plan) -> str | None:
    """`data.shards` is for tasks with samples, which dummy has not."""
    if plan.data.shards is None or not isinstance(plan.task, DummyTask):
        return None
    return f"'data.shards' is {shown(plan.data.shards)}, and the task dummy has no samples: leave it out."


def broken_shards_are_of_shards(plan: Plan) -> str | None:
    """`data.on_broken` is for `data.shards`."""
    if plan.data.on_broken == "stop" or plan.data.shards is not None:
        return None
    return (
        f"'data.on_broken' is '{plan.data.on_broken}', which is for shards: give data.shards, or leave it out; text, "
        "tables and grids have a setting of their own."
    )


# ------------------------------------------------------------------------------ local work
def control_variate_needs_plain_sgd(plan: Plan) -> str | None:
    """Control variates need plain SGD: c_k is a mean of gradients only where a step is lr times the
    gradient."""
    optimizer = plan.local.optimizer
    if not plan.local.control_variate or plan.local.kind == "gradient":
        return None
    if optimizer.name == "sgd" and optimizer.used_momentum == 0 and optimizer.clip_norm == 0:
        return None
    return (
        f"'local.control_variate' is True with {optimizer.name}, momentum {optimizer.used_momentum} and clip_norm "
        f"{optimizer.clip_norm}: control variates are defined for plain SGD. Set local.optimizer to sgd with "
        "momentum 0 and clip_norm 0, or switch control_variate off."
    )


def control_variate_without_proximal(plan: Plan) -> str | None:
    """Control variates and the proximal term exclude each other: c_k would learn the term as if it were
    data."""
    if not plan.local.control_variate or plan.local.proximal == 0:
        return None
    return (
        f"'local.proximal' is {plan.local.proximal} with control_variate: the control variate would learn "
        "the proximal term as if it were data. Use one of the two."
    )


def gradient_without_schedule(plan: Plan) -> str | None:
    """`local.kind: gradient` takes no inner steps, so there is nothing to schedule."""
    if plan.local.kind != "gradient" or (
        plan.schedule.kind == "constant" and plan.schedule.warmup_steps == 0
    ):
        return None
    return (
        f"'schedule.kind' is '{plan.schedule.kind}' with {plan.schedule.warmup_steps} warm-up steps, but "
        "local.kind 'gradient' takes no inner steps to schedule. Use a constant schedule without warm-up, or "
        "local.kind 'steps'."
    )


def schedule_fits_the_run(plan: Plan) -> str | None:
    """Warm-up and decay fit into the schedule's steps."""
    schedule = plan.schedule
    total = schedule.total_steps or plan.rounds.total * plan.local.steps
    if schedule.kind == "constant":
        return None
    if schedule.warmup_steps >= total:
        return (
            f"'schedule.warmup_steps' is {schedule.warmup_steps}, but the schedule has {total} steps in all "
            f"(schedule.total_steps, or rounds.total * local.steps): give schedule.warmup_steps={total // 10}, or "
            f"another below {total}."
        )
    if schedule.decay_steps is not None and schedule.warmup_steps + schedule.decay_steps > total:
        return (
            f"'schedule.decay_steps' is {schedule.decay_steps}: with {schedule.warmup_steps} warm-up steps "
            f"that is more than the schedule's {total} steps in all. Make one of them shorter."
        )
    return None


# ------------------------------------------------------------------------------ how updates travel
def mesh_publishes_no_change(plan: Plan) -> str | None:
    """A mesh has no `change_codec`: nobody publishes a change."""
    codec = plan.change_codec
    if plan.topology != "mesh" or (codec.name == "fp32" and not codec.error_feedback):
        return None
    return (
        f"'change_codec.name' is '{codec.name}', but in a mesh nobody publishes a change: every client "
        "merges the updates itself. Leave change_codec out, or use topology 'star'."
    )


# ------------------------------------------------------------------------------ task
def dummy_tensors_fit(plan: Plan) -> str | None:
    """The dummy task has at least as many parameters as tensors."""
    task = plan.task
    if not isinstance(task, DummyTask) or task.tensors <= task.parameters:
        return None
    return f"'task.tensors' is {task.tensors}, but there are only {task.parameters} parameters to divide."


def model_is_described(plan: Plan) -> str | None:
    """A `task.model_type` other than gpt2 comes with `task.model`: its own defaults are often billions
    large."""
    task = plan.task
    if not isinstance(task, LanguageModelTask) or task.model_type == "gpt2":
        return None
    if task.model and task.model != LanguageModelTask().model:
        return None
    return (
        f"'task.model_type' is '{task.model_type}', but task.model does not say how large: expected keys of "
        "its configuration class, such as hidden_size, num_hidden_layers and num_attention_heads."
    )


def weights_bring_their_model(plan: Plan) -> str | None:
    """With `task.weights` the model is that of the weights: `task.model_type` and `task.model` are left out."""
    task, usual = plan.task, LanguageModelTask()
    if not isinstance(task, LanguageModelTask) or task.weights is None:
        return None
    if task.model_type == usual.model_type and task.model == usual.model:
        return None
    return (
        f"'task.weights' is {shown(task.weights)}, and the model is that of the weights: leave task.model_type and "
        "task.model out, or leave task.weights out for random weights."
    )


def tokens_are_those_of_the_weights(plan: Plan) -> str | None:
    """With `task.weights`, or with text that is tokens already, a tokenizer is not trained: its ids have a
    meaning."""
    task = plan.task
    if not isinstance(task, LanguageModelTask):
        return None
    kind, weights, tokens = task.tokenizer.kind, task.weights, task.text.kind == "tokens"
    if kind == "file" or (weights is None and (not tokens or kind == "byte")):
        return None
    why = f"'task.weights' is {shown(weights)}" if weights is not None else "'task.text.kind' is 'tokens'"
    return (
        f"'task.tokenizer.kind' is '{kind}', but {why}, where each token id has a meaning already: set "
        "task.tokenizer.kind to 'file' and task.tokenizer.path to the tokenizer that the ids are of."
    )


def tokenizer_file_is_named(plan: Plan) -> str | None:
    """A tokenizer of kind `file` has a `task.tokenizer.path`."""
    task = plan.task
    if not isinstance(task, LanguageModelTask) or task.tokenizer.kind != "file" or task.tokenizer.path:
        return None
    return (
        "'task.tokenizer.kind' is 'file', but task.tokenizer.path is missing: give a tokenizer.json, or a directory "
        "with one."
    )


def adapter_has_weights(plan: Plan) -> str | None:
    """`task.adapter` comes with `task.weights`: beside random weights there is nothing to adapt."""
    task = plan.task
    if not isinstance(task, FineTuned) or task.adapter is None or task.weights is not None:
        return None
    return (
        f"'task.adapter.name' is '{task.adapter.name}', but the weights that it would freeze are random: give "
        "task.weights, or leave task.adapter out."
    )


def validation_has_one_source(plan: Plan) -> str | None:
    """Text with its own validation path or split has no share for validation."""
    task = plan.task
    if not isinstance(task, LanguageModelTask):
        return None
    text, usual = task.text, LanguageModelTask().text.validation_share
    own = "validation_path" if text.validation_path is not None else "validation_split"
    if getattr(text, own) is None or text.validation_share == usual:
        return None
    return (
        f"'task.text.validation_share' is {text.validation_share}, but task.text.{own} names the validation text: "
        "leave one of them out."
    )


def heads_divide_the_width(plan: Plan) -> str | None:
    """The heads of a model for grids or chess endgames (`task.model.heads`) divide its width."""
    task = plan.task
    if not isinstance(task, GridsTask | ChessEndgamesTask) or task.model.width % task.model.heads == 0:
        return None
    width = task.model.width
    choices = [str(heads) for heads in range(1, min(width, 32) + 1) if width % heads == 0]
    return (
        f"'task.model.heads' is {task.model.heads}, which does not divide task.model.width {width}: choose "
        f"{' or '.join([', '.join(choices[:-1]), choices[-1]] if choices[1:] else choices)}."
    )


def grid_sets_are_distinct(plan: Plan) -> str | None:
    """The sets of `task.evaluation` have different names, none of them `training`."""
    task = plan.task
    names = [part.name for part in task.evaluation] if isinstance(task, GridsTask) else []
    taken = sorted(name for name in {"training", *names} if ["training", *names].count(name) > 1)
    if not taken:
        return None
    return f"'task.evaluation' has the name '{taken[0]}', which is taken: give each set a name of its own."


def generated_grids_are_used(plan: Plan) -> str | None:
    """`task.generated` is for sets that are generated."""
    task = plan.task
    if not isinstance(task, GridsTask) or task.generated == GridsTask().generated:
        return None
    if "generated" in (task.training, *(part.path for part in task.evaluation)):
        return None
    return "'task.generated' says how puzzles are generated, but all sets are read from files: leave it out."


# ------------------------------------------------------------------------------ who takes part, and when
def clients_within_bounds(plan: Plan) -> str | None:
    """`membership.min_clients` is at most `max_clients`."""
    low, high = plan.membership.min_clients, plan.membership.max_clients
    if low <= high:
        return None
    return (
        f"'membership.min_clients' is {low}, more than max_clients {high}: swap them, or raise max_clients."
    )


def quorum_can_be_reached(plan: Plan) -> str | None:
    """`rounds.quorum` is at most `membership.min_clients`: the run goes on with so many."""
    quorum, low = plan.rounds.quorum, plan.membership.min_clients
    if quorum <= low:
        return None
    return (
        f"'rounds.quorum' is {quorum}, but the run goes on with {low} clients (membership.min_clients), who "
        f"could never close a round: expected at most {low}, or raise min_clients."
    )


def allow_list_is_filled(plan: Plan) -> str | None:
    """An allow-list names `min_clients` different keys or more."""
    allow, low = plan.membership.allow, plan.membership.min_clients
    if plan.membership.kind != "allow_list":
        return None
    if len(set(allow)) < len(allow):
        return f"'membership.allow' names {len(allow) - len(set(allow))} keys twice: list each key once."
    if len(allow) < low:
        return (
            f"'membership.allow' has {len(allow)} keys, but min_clients is {low}: list at least {low} public "
            "keys, as `manyhands client show-identity` prints them, or set membership.kind to 'open'."
        )
    return None


def deadlines_in_order(plan: Plan) -> str | None:
    """`rounds.deadline_floor_s` is at most `deadline_ceiling_s`."""
    floor, ceiling = plan.rounds.deadline_floor_s, plan.rounds.deadline_ceiling_s
    if floor <= ceiling:
        return None
    return f"'rounds.deadline_floor_s' is {floor}, above deadline_ceiling_s {ceiling}: expected at most that."


def suspicion_before_loss(plan: Plan) -> str | None:
    """`rounds.suspected_after_s` is below `lost_after_s`."""
    suspected, lost = plan.rounds.suspected_after_s, plan.rounds.lost_after_s
    if suspected < lost:
        return None
    return (
        f"'rounds.suspected_after_s' is {suspected}, not below lost_after_s {lost}: a client must be "
        "suspected before it is given up. Expected a smaller value; 2 and 30 are the defaults."
    )


RULES: Final[tuple[Rule, ...]] = (
    no_lag,
    no_fragments,
    no_late_apply,
    no_changing_buffers,
    no_local_data,
    shards_hold_samples,
    broken_shards_are_of_shards,
    control_variate_needs_plain_sgd,
    control_variate_without_proximal,
    gradient_without_schedule,
    schedule_fits_the_run,
    mesh_publishes_no_change,
    dummy_tensors_fit,
    model_is_described,
    weights_bring_their_model,
    tokens_are_those_of_the_weights,
    tokenizer_file_is_named,
    adapter_has_weights,
    validation_has_one_source,
    heads_divide_the_width,
    grid_sets_are_distinct,
    generated_grids_are_used,
    clients_within_bounds,
    quorum_can_be_reached,
    allow_list_is_filled,
    deadlines_in_order,
    suspicion_before_loss,
)


# ------------------------------------------------------------------------------ options that would be ignored
def idle_settings(plan: Plan) -> Iterator[str]:
    """Settings that differ from their default although their section's choice has no use for them."""
    for path, choice in CHOICES.items():
        section: Any = plan
        for part in path.split("."):
            section = getattr(section, part, None)
        if section is None:  # task.tokenizer of a task without one
            continue
        chosen = getattr(section, choice.tag)
        for name in choice.idle.get(chosen, ()):
            value, default = getattr(section, name), type(section).model_fields[name].get_default()
            if value != default:
                yield (
                    f"'{path}.{name}' is {shown(value)}, but {path}.{choice.tag} '{chosen}' has no use for "
                    "it: leave it out, or choose another."
                )
