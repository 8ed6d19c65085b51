# VFlow with its embedded model. Two stages: packages are installed in the first, the second holds only what runs.
# For CPUs by default; `--build-arg DEVICE=cuda` for NVIDIA GPUs.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
# Where pip looks for packages. PyPI's torch brings the CUDA libraries: for DEVICE=cpu name an index with CPU builds, which
# keeps gigabytes out of the image.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG DEVICE=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/vflow
ENV PATH=/opt/vflow/bin:$PATH
WORKDIR /src
# torch alone first: its layer stays cached as long as the pins stay the same.
COPY constraints.txt .
RUN pip install --constraint constraints.txt torch
RUN test "$DEVICE" = cpu || python -c 'import sys, torch; sys.exit(None if torch.version.cuda else "this torch has no CUDA: choose another index for DEVICE=cuda")'
COPY . .
RUN pip install --constraint constraints.txt ./client '.[otel]'

FROM ${BASE}
# The compiler makes the kernels for the processor at hand when the service starts; on a GPU, Triton calls it too.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin vflow && install --directory --owner=vflow /data
COPY --from=build /opt/vflow /opt/vflow
ARG DEVICE=cpu
ENV PATH=/opt/vflow/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface \
    XDG_CACHE_HOME=/data/cache \
    TRITON_CACHE_DIR=/data/cache/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    VFLOW_DEVICE=${DEVICE} \
    VFLOW_HOST=0.0.0.0 \
    VFLOW_PORT=50051 \
    VFLOW_METRICS_HOST=0.0.0.0 \
    VFLOW_METRICS_PORT=9464 \
    VFLOW_DATA=/data \
    VFLOW_LOG_FORMAT=json
USER vflow
VOLUME /data
EXPOSE 50051 9464
HEALTHCHECK --interval=15s --timeout=5s --start-period=90s --retries=3 CMD ["vflow", "health"]
ENTRYPOINT ["vflow"]
CMD ["serve"]
