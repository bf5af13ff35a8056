# The service for a CPU:        docker build -t transformer-server .
# for an NVIDIA GPU:            docker build -t transformer-server:cuda --build-arg DEVICE=cuda .
#
# TORCH_INDEX is another package index to take torch from. Left empty, pip takes its default build, which on
# Linux carries the CUDA libraries (gigabytes) and runs on a CPU as well; for a lean CPU image give the address
# of PyTorch's own index of CPU builds, for another CUDA release the address of that one's.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# Every file is checked against its hash, nothing is built from source, and pip resolves nothing. Another
# index has other builds of torch: TORCH_SHA256, if given, is the hash of the one that is wanted.
COPY requirements.txt ./
RUN awk '/^[a-z]/ { torch = /^(torch|triton|nvidia-|cuda-)/ } { print > (torch ? "torch.txt" : "service.txt") }' requirements.txt \
 && pip install --require-hashes --no-deps --only-binary=:all: -r service.txt
ARG TORCH_INDEX=""
ARG TORCH_SHA256=""
RUN if [ -n "$TORCH_INDEX" ]; then \
      echo "$(awk '/^torch==/ { print $1 }' torch.txt)${TORCH_SHA256:+ --hash=sha256:$TORCH_SHA256}" > torch.txt \
      && pip install --no-deps --only-binary=:all: --index-url "$TORCH_INDEX" -r torch.txt; \
    else \
      pip install --require-hashes --no-deps --only-binary=:all: -r torch.txt; \
    fi

FROM ${PYTHON_IMAGE}
ARG DEVICE=cpu
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    TRANSFORMER_HOST=0.0.0.0 \
    TRANSFORMER_PORT=8000 \
    TRANSFORMER_DEVICE=${DEVICE}
# For a CPU a compiler comes along: at its start the service compiles its kernels for the processor that it finds
# (model/kernels.py). Without one it runs, more slowly.
RUN if [ "$DEVICE" = cpu ]; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
RUN groupadd --gid 10001 app \
 && useradd --uid 10001 --gid app --no-create-home --home-dir /tmp --shell /usr/sbin/nologin app
COPY --from=dependencies /opt/venv /opt/venv
WORKDIR /srv
COPY LICENSE pyproject.toml ./
COPY weights ./weights
COPY model ./model
COPY app ./app
# The index of known translations, which every start else would make.
ENV TRANSFORMER_CACHE_DIR=/srv/cache
RUN python -c "from pathlib import Path; from model.examples import load_examples; \
      load_examples([Path('model/training/texts')], Path('cache'))" \
 && chmod -R a+rX cache
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['TRANSFORMER_PORT'] + '/ready', timeout=2)"]
ENTRYPOINT ["python", "-m", "app"]
