"""Fetching a model from the Hugging Face hub: safetensors, configuration and tokenizer, never pickles."""

from __future__ import annotations

from pathlib import Path

from featherweight.errors import CheckpointError

WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "tokenizer*", "LICENSE*")
UNWANTED = ("*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx")


def download(model: str, revision: str | None = None, token: str | None = None) -> Path:
    """Fetch the model `owner/name` into the hub's own cache, or find it there, and return its local folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Order matters: a gated repository is also a RepositoryNotFoundError, being offline also a missing local entry.
    try:
        folder = snapshot_download(
            model, revision=revision, token=token, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{model} is gated: accept its terms at https://huggingface.co/{model}, then log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{model} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model} is neither a local folder nor a public model on the hub; "
            "if it is private, log in with `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{model!r} is neither a local folder nor a valid hub id (owner/name)") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{model} is not a local folder, not in the hub's cache, and the hub cannot be reached: "
            "check the connection and HF_HUB_OFFLINE, or give a local folder"
        ) from error
    except OSError as error:  # includes the connection and HTTP errors of requests, and a full disk
        raise CheckpointError(f"cannot download {model} from the hub: {error}") from error
    except Exception as error:  # httpx, which newer huggingface_hub uses, has errors that are no OSError
        if type(error).__module__.split(".")[0] not in ("httpx", "httpcore", "requests", "huggingface_hub"):
            raise
        raise CheckpointError(f"cannot download {model} from the hub: {error}") from error
    return Path(folder)
