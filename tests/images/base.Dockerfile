# What stands in for the public base images: Debian's Python, and the packages of NVIDIA's that matter, without CUDA.
ARG BASE_IMAGE=minitron-pipelines/debian:12
FROM ${BASE_IMAGE} AS python
RUN python3 -m venv /opt/python
ENV PATH=/opt/python/bin:$PATH

# As in NVIDIA's image: another NumPy and transformers than constraints.txt has, and a protobuf that kfp excludes.
FROM python AS nemo
COPY constraints-nemo.txt /build/
RUN pip install --no-cache-dir --constraint /build/constraints-nemo.txt accelerate datasets tensorboard torch transformers \
    && pip install --no-cache-dir --no-deps --constraint /build/constraints-nemo.txt megatron-core nemo_toolkit \
    && pip install --no-cache-dir --no-deps protobuf==5.29.5 \
    && rm /build/constraints-nemo.txt
