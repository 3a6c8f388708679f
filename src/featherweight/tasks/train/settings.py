"""How long and on how much a training works; what it does in each step is the recipe's."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from featherweight.system.precision import Precision


class TrainSettings(BaseModel):
    """Settings of a training beside its recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    steps: int = Field(1000, ge=1, description="of the optimiser")
    batch: int = Field(8, ge=1, description="windows that are run at a time")
    accumulate: int = Field(1, ge=1, description="batches whose gradients make a step")
    length: int = Field(256, ge=2, description="tokens a window; cut to the model's context")
    held_out_windows: int = Field(
        16, ge=1, description="windows that are not trained on, where no text is given for it"
    )
    eval_every: int = Field(100, ge=1, description="steps between evaluations on held-out windows; also at the end")
    log_every: int = Field(10, ge=1, description="steps between two lines of the log")
    save_every: int | None = Field(None, ge=1, description="steps between two savings; else at least a minute")
    seed: int = Field(0, ge=0, description="of the first weights, the windows and their order")
    dtype: Precision = Field("auto", description="of activations; latents are float32; auto: the faster here")

    @property
    def windows_a_step(self) -> int:
        return self.batch * self.accumulate

    def identity(self) -> dict[str, object]:
        """Those on which the result depends."""
        return self.model_dump(mode="json", exclude={"eval_every", "log_every", "save_every", "dtype"})
