"""A recipe applied to any module in memory, convolutional networks too: codes for its layers, from batches of its own.

codes = codes_of_module(module, lambda m, images: m(images), batches, "gptq", convolutions=True)
put_codes(module, codes)                                # featherweight.model.layers.replace
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from featherweight.errors import RecipeError
from featherweight.events import Observer, silent
from featherweight.methods.budget.base import LayerCandidates
from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.calibrate.session import BlockSession
from featherweight.methods.calibrate.statistics import gathered_names
from featherweight.methods.quantize.base import HeldWeight, SolveOptions
from featherweight.methods.quantize.treatment import scope_of
from featherweight.methods.recipe import Recipe, load_recipe
from featherweight.storage.checkpoint.anatomy import Anatomy
from featherweight.storage.codes import Code
from featherweight.system.devices import solving_device
from featherweight.tasks.compress.plan import Job
from featherweight.tasks.compress.refusals import check_layers, check_recipe
from featherweight.tasks.compress.solve import HELD_OUT, InputGroup, Solved, group_seed, solve_layer


def codes_of_module(
    module: nn.Module,
    forward: Callable[[nn.Module, Any], Any],
    batches: Sequence[Any],
    recipe: str | Recipe,
    *,
    convolutions: bool = False,
    blocks: str | None = None,
    threads: int | None = None,
    seed: int = 0,
    notify: Observer = silent,
) -> dict[str, Code]:
    """Codes for the layers of a module that a recipe chooses.

    Parameters
    ----------
    module : stays as it is; the work is done on a copy, which takes its memory once more
    forward : runs the module on one batch
    batches : whatever `forward` takes; an eighth of them (`calibration.held_out`) only judges what was made with the
        others, so a recipe with data needs two at least
    recipe : a preset's name, or a recipe; of its choices each must see one layer at a time
    convolutions, blocks : see `Calibration.of_module`; a convolution's code is that of the matrix
        [out, in / groups * product of kernel]
    notify : is told {"event": "solved", "layer", "code", and what the method reports}, beside what calibration tells

    Returns
    -------
    Path of the layer in the module -> code, in order of execution; see `featherweight.model.layers.replace.put_codes`.

    Raises
    ------
    RecipeError : the recipe sees more than a layer at a time, or needs what a module does not have
    CalibrationError : the module cannot be run as it is asked to
    """
    chosen = load_recipe(recipe)
    needs = _needs(chosen)
    opened = Calibration.of_module(
        copy.deepcopy(module),
        forward,
        batches,
        chosen.calibration,
        needs,
        blocks=blocks,
        convolutions=convolutions,
        notify=notify,
    )
    with opened as calibration:
        jobs = _jobs(chosen, calibration)
        codes: dict[str, Code] = {}
        for session in calibration.blocks():
            for stage in session.stages:
                names = [name for name in stage if name in jobs]
                found = session.gather(names, [n for n in needs if n in gathered_names()]) if names and needs else {}
                groups: dict[tuple[str, tuple[str, ...]], InputGroup] = {}
                for name in names:
                    place, own = session.layers[name].input_group, jobs[name].treatment.needs
                    known = {
                        k: v for k, v in found.get(name, {}).items() if own and (k in own or k not in chosen.needs)
                    }
                    group = groups.setdefault((place, own), InputGroup(known, group_seed(seed, place)))
                    if "fisher" in own:
                        group = group.having({"fisher": calibration.fisher(name)})
                    options = SolveOptions(threads=threads).on(solving_device(session.device))
                    solved = _solved(jobs[name], session, group, options)
                    codes[name] = solved.code
                    session.set_weight(name, solved.code.decode())
                    notify({"event": "solved", "layer": name, "code": solved.code.spec, **solved.notes})
    return codes


def _needs(recipe: Recipe) -> tuple[str, ...]:
    """Statistics to gather; RecipeError for a recipe that a module in memory cannot be given."""
    check_recipe(recipe)
    wide = next((choice for choice in recipe.choices if scope_of(choice) != "layer"), None)
    if wide is not None:
        raise RecipeError(
            f"recipe {recipe.name} treats a {scope_of(wide)} at a time ({wide.kind}), which can be done for models in "
            "folders only: take one that treats layers, like gptq, ptqtp or rtn-4"
        )
    if recipe.allocation.needs_errors:
        raise RecipeError(
            f"recipe {recipe.name}: the allocation {recipe.allocation.kind} measures layers, which can be done for "
            "models in folders only: name grids in overrides"
        )
    strange = [name for name in recipe.needs if name not in gathered_names() and name != "fisher"]
    if strange:
        raise RecipeError(
            f"recipe {recipe.name} needs {', '.join(strange)}, which is there for models in folders only: take another"
        )
    judged = bool(recipe.needs) and recipe.calibration.held_out > 0
    return (*recipe.needs, *((HELD_OUT,) if judged and HELD_OUT not in recipe.needs else ()))


def _jobs(recipe: Recipe, calibration: Calibration) -> dict[str, Job]:
    layers = calibration.host.layers
    blocks = len(calibration.host.blocks)
    anatomy = Anatomy("module", blocks, "", "", tuple(layers.values()), None, (), (), (), ())
    candidates = {
        name: LayerCandidates.of(layers[name].shape, treatments)
        for name, treatments in recipe.candidates_for(anatomy).items()
    }
    jobs = {name: Job(layers[name], one) for name, one in recipe.allocation.assign(candidates).items()}
    check_layers(recipe, anatomy, ((name, (job.treatment,)) for name, job in jobs.items()), text=False)
    return jobs


def _solved(job: Job, session: BlockSession, group: InputGroup, options: SolveOptions) -> Solved:
    """A layer's code; without data where too few inputs, or some that are not finite, were seen."""
    source, name = HeldWeight(session.weight(job.layer.name)), job.layer.name
    reason = None
    if job.treatment.needs and name in session.non_finite:
        reason = f"its inputs are not finite from batch {session.non_finite[name]['batch']} on"
    elif job.treatment.needs and name in session.starved:
        reason = f"only {session.starved[name]} inputs were seen"
    if reason is None:
        return solve_layer(job, source, group, options)
    plain = solve_layer(job.without_data(), source, InputGroup(dict[str, Tensor](), group.seed), options)
    return Solved(plain.code, {**plain.notes, "fallback": "data-free", "reason": reason})
