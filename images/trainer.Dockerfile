# The image of every task: the NeMo image and this package. Build it in the repository's root:
#   docker build -f images/trainer.Dockerfile -t minitron-pipelines/trainer:0.1.0 .
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:25.11
FROM ${BASE_IMAGE}

# kfp pins what the base image has in other versions; its executor needs none of that.
RUN pip install --no-cache-dir --no-deps kfp==2.17.0 kfp-pipeline-spec==2.17.3 \
    && pip install --no-cache-dir docstring-parser google-cloud-storage==3.17.1 \
        mlflow-skinny==3.17.2 lm-eval==0.4.13 zstandard

COPY pyproject.toml README.md /opt/minitron/
COPY minitron /opt/minitron/minitron
COPY components /opt/minitron/components
COPY pipelines /opt/minitron/pipelines
RUN pip install --no-cache-dir --no-deps /opt/minitron && minitron --version

# Progress bars go to the pod's log: one line every 30 seconds.
ENV TQDM_MININTERVAL=30 PYTHONUNBUFFERED=1
