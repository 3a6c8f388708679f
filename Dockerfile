# The command `feather` on a CPU.
#     docker build -t featherweight .
#     docker run --rm -it -v "$PWD":/work featherweight plan MODEL --recipe four
# Kernels are compiled for all processors of the platform and chosen at run time. BASE: another image with Python and apt.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY cmake cmake
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE}
# Builds of PyTorch for processors alone; the versions of the lock file.
COPY requirements.lock /tmp/
COPY --from=build /wheels /wheels
RUN grep -E '^[a-zA-Z]' /tmp/requirements.lock > /tmp/constraints.txt \
    && pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
       --constraint /tmp/constraints.txt /wheels/*.whl \
    && rm -r /wheels /tmp/*
RUN useradd --create-home feather
USER feather
WORKDIR /work
ENTRYPOINT ["feather"]
CMD ["--help"]
