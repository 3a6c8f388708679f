"""Options of the commands that write text: how the next token is chosen."""

from __future__ import annotations

from typing import Annotated

import typer

Temperature = Annotated[
    float | None,
    typer.Option("--temperature", min=0.0, help="0 takes the likeliest token; else the model's, else 0.8."),
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", min=0, help="Sample among the K likeliest, 0: all; else the model's, else 50."),
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", min=0.0, max=1.0, help="Sample among this probability; else the model's, else 1."),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", min=0.0, max=1.0, help="Least share of the likeliest one's probability; else the model's."),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", min=1e-6, help="Above 1, tokens that occurred are less likely; else the model's."
    ),
]
SamplingSeed = Annotated[int, typer.Option("--seed", help="Of the sampling.")]
