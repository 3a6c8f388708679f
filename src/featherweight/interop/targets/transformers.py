"""transformers: a folder of ours as it is, with `import featherweight`; anything else exported."""

from __future__ import annotations

from featherweight.errors import CheckpointError
from featherweight.interop.engines import Answer, Target
from featherweight.interop.stored import StoredModel
from featherweight.registry import register
from featherweight.storage.codes import code_layout


@register("target", "transformers")
class Transformers(Target):
    """Runs all of our codes in one process; over several only plain weights."""

    title = "transformers"

    @classmethod
    def ask(cls, model: StoredModel, tensor_parallel: int = 1) -> Answer:
        if not model.coded:
            return Answer(True, "as it is")
        for tensor in model.tensors.values():
            if tensor.spec is not None:
                try:
                    code_layout({key: value for key, value in tensor.spec.items() if key != "bias"})
                except CheckpointError as error:
                    return Answer(
                        False, "with the release or package that knows its codes", (f"{tensor.name}: {error}",)
                    )
        if tensor_parallel > 1:
            first = next(tensor for tensor in model.tensors.values() if tensor.spec is not None)
            return Answer(
                False,
                f"feather export {model.folder} --to dense --out OUT",
                (
                    f"{first.name} and the other packed layers are not cut for {tensor_parallel} processes: export the "
                    "model, or run it in one",
                ),
            )
        return Answer(True, "as it is, with `import featherweight`")
