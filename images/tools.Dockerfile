# The image of the tasks that only move files and call servers: no torch, no CUDA. Build it in the repository's root:
#   docker build -f images/tools.Dockerfile --build-arg VERSION=0.11.0 -t minitron-pipelines/tools:0.11.0 .
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}
USER 0

COPY pyproject.toml LICENSE README.md constraints.txt /build/minitron/
COPY minitron /build/minitron/minitron
COPY components /build/minitron/components
COPY pipelines /build/minitron/pipelines
# Without dependencies: this package's are the trainer's, and kfp's are for its client, not for its executor.
RUN pip install --no-cache-dir --constraint /build/minitron/constraints.txt \
        docstring-parser google-cloud-storage huggingface-hub jinja2 mlflow-skinny numpy pandas protobuf pydantic pyyaml requests rich \
        safetensors tqdm typer \
    && pip install --no-cache-dir --constraint /build/minitron/constraints.txt --no-deps \
        kfp kfp-pipeline-spec /build/minitron \
    && rm -r /build/minitron

RUN useradd --uid 1000 --home-dir /home/minitron minitron && install -d -o 1000 -g 1000 /home/minitron
ENV HOME=/home/minitron TQDM_MININTERVAL=30 PYTHONUNBUFFERED=1
WORKDIR /home/minitron
USER 1000:1000

# The label cannot be read from the package; it can be checked.
ARG VERSION
# What the records of the stages call this image; give the name and tag that it is pushed under.
ARG IMAGE=minitron-pipelines/tools:${VERSION}
ENV MINITRON_IMAGE=${IMAGE}
RUN test "$(minitron --version)" = "${VERSION}" \
    || { echo "the package is version $(minitron --version): build with --build-arg VERSION=$(minitron --version)"; false; }
LABEL org.opencontainers.image.title="minitron-pipelines/tools" \
      org.opencontainers.image.description="The tasks of minitron-pipelines that need no torch" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
