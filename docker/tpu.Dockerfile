# The code and its requirements, for TPU hosts:
#
#     docker build --tag IMAGE --file docker/tpu.Dockerfile .
FROM python:3.12-slim
WORKDIR /stackjax
COPY requirements.txt requirements-tpu.txt ./
COPY requirements requirements
RUN pip install --no-cache-dir --requirement requirements-tpu.txt
COPY configs configs
COPY stackjax stackjax
