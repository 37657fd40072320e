# NVIDIA GPUs, the same pinned packages as `make install`.
#   docker build -t ksa-train .
#   docker run --gpus all --shm-size=16g -v "$PWD/runs:/workspace/runs" -v /data:/data ksa-train \
#     torchrun --nproc-per-node 8 -m train model=hybrid_1b9 data=jsonl data.path=/data/corpus.jsonl run.precision=bf16 run.samples_per_step=8
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

# The devel image has nvcc and headers, which Triton and DeepSpeed's just-in-time extensions ask for.
ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PATH=/opt/venv/bin:$PATH DS_BUILD_OPS=0
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3.12 python3.12-venv python3.12-dev git build-essential ninja-build \
 && rm -rf /var/lib/apt/lists/* \
 && python3.12 -m venv /opt/venv

WORKDIR /workspace
COPY requirements/pins.txt requirements/pins.txt
# torch's own wheels bring CUDA's libraries; the largest layer comes first so that code changes do not rebuild it.
RUN pip install --no-cache-dir --constraint requirements/pins.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY train train
COPY ksa_model ksa_model
COPY data_pipeline data_pipeline
COPY launch launch
COPY configs configs
RUN pip install --no-cache-dir --constraint requirements/pins.txt --editable .

# Gradients and activations of long sequences come and go in sizes that fragment the default allocator.
ENV PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
CMD ["python", "-m", "train", "--help"]
