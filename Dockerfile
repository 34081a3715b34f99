# Two images of hsa-compile, from a checkout:
#
#     docker build --target cpu --tag hsa-compile:cpu .
#     docker build --target cuda --tag hsa-compile:cuda .        # then: docker run --gpus all ...
FROM debian:bookworm-slim AS base
# C++ kernels need g++, and what Triton compiles to launch a kernel needs Python's headers too.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ca-certificates g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/hsa-compile
ENV PATH=/opt/hsa-compile/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE MANIFEST.in ./
COPY hsa_compile hsa_compile
WORKDIR /work
# Tuned schedules and compiled kernels; mount a volume here to keep them.
ENV HSA_COMPILE_CACHE_DIR=/cache
VOLUME /cache
ENTRYPOINT ["hsa-compile"]
CMD ["doctor"]

FROM base AS cuda
RUN pip install --constraint /src/constraints.txt "/src[train]"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM base AS cpu
# PyPI's PyTorch for Linux brings 3 GB of CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --constraint /src/constraints.txt --index-url $TORCH_INDEX torch \
    && pip install --constraint /src/constraints.txt "/src[train]"
