"""The streaming run: checkpoint in, compressed Hugging Face folder out, one tensor at a time, resumable."""

from featherweight.callable_package import make_callable

make_callable(__name__)
