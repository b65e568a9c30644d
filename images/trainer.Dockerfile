# The image of every task but register: NVIDIA's NeMo image and this package. Build it in the repository's root:
#   docker build -f images/trainer.Dockerfile --build-arg VERSION=0.11.0 -t minitron-pipelines/trainer:0.11.0 .
# The base can be pinned by its digest: --build-arg BASE_IMAGE=nvcr.io/nvidia/nemo@sha256:…
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:25.11
FROM ${BASE_IMAGE}
USER 0

COPY pyproject.toml LICENSE README.md constraints.txt /build/minitron/
COPY images/install.py /build/minitron/images/
COPY minitron /build/minitron/minitron
COPY components /build/minitron/components
COPY pipelines /build/minitron/pipelines
RUN python3 /build/minitron/images/install.py && rm -r /build/minitron

# NVIDIA's image may have a user of this number already; the home is ours, and writable, either way.
RUN (getent passwd 1000 || useradd --uid 1000 --home-dir /home/minitron minitron) \
    && install -d -o 1000 -g 1000 /home/minitron
# Progress bars go to the pod's log: one line every 30 seconds.
ENV HOME=/home/minitron TQDM_MININTERVAL=30 PYTHONUNBUFFERED=1
WORKDIR /home/minitron
USER 1000:1000

# The label cannot be read from the package; it can be checked.
ARG VERSION
# What the records of the stages call this image; give the name and tag that it is pushed under.
ARG IMAGE=minitron-pipelines/trainer:${VERSION}
ENV MINITRON_IMAGE=${IMAGE}
RUN test "$(minitron --version)" = "${VERSION}" \
    || { echo "the package is version $(minitron --version): build with --build-arg VERSION=$(minitron --version)"; false; }
LABEL org.opencontainers.image.title="minitron-pipelines/trainer" \
      org.opencontainers.image.description="Every task of minitron-pipelines but register" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
