# VFlow with its embedded model. Two stages: packages are installed in the first, the second holds only what runs.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
# Where pip looks for packages. Name an index with CPU builds of torch to keep gigabytes of CUDA libraries out of the image.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/vflow
ENV PATH=/opt/vflow/bin:$PATH
WORKDIR /src
# torch alone first: its layer stays cached as long as the pins stay the same.
COPY constraints.txt .
RUN pip install --constraint constraints.txt torch
COPY . .
RUN pip install --constraint constraints.txt ./client .

FROM python:${PYTHON_VERSION}-slim
# The compiler makes the decode kernel for the processor at hand when the service starts.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --system --uid 10001 --no-create-home vflow && install --directory --owner=vflow /data
COPY --from=build /opt/vflow /opt/vflow
ENV PATH=/opt/vflow/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface \
    XDG_CACHE_HOME=/data/cache \
    VFLOW_HOST=0.0.0.0 \
    VFLOW_PORT=50051 \
    VFLOW_DATA_DIR=/data \
    VFLOW_LOG_FORMAT=json
USER vflow
VOLUME /data
EXPOSE 50051
HEALTHCHECK --interval=15s --timeout=5s --start-period=90s --retries=3 CMD ["vflow", "health"]
ENTRYPOINT ["vflow"]
CMD ["serve"]
