# The MLflow server of manifests/: tracking, registry and artifacts, with what it needs for PostgreSQL and buckets. Build
# it in the repository's root:
#   docker build -f images/mlflow.Dockerfile -t minitron-pipelines/mlflow:3.17.2 .
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}

COPY constraints.txt /build/constraints.txt
RUN pip install --no-cache-dir --constraint /build/constraints.txt mlflow psycopg2-binary google-cloud-storage \
    && rm /build/constraints.txt

USER 1000:1000
ENTRYPOINT ["mlflow", "server"]
