# The commands and the page in a container; docs/deployment.md says how to run it.
#   docker build -t ast .
#   docker build -t ast:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
FROM python:3.13.1-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ffmpeg \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/ast
COPY constraints.txt .
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY feature_extraction feature_extraction
COPY modeling_ast modeling_ast
COPY scripts scripts
COPY hub_configs hub_configs
RUN pip install --no-cache-dir --constraint constraints.txt '.[demo,export]'

RUN useradd --create-home --uid 1000 ast
USER ast
WORKDIR /home/ast
# Checkpoints that were fetched, and what --speed measured: mount a volume here to keep them. A new
# volume belongs to the user only if the folder is in the image and does.
ENV HF_HOME=/home/ast/.cache/huggingface
RUN mkdir --parents "$HF_HOME"

EXPOSE 7860
# Of the page; a command that ends needs no look at its health.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD \
    grep -q ast-demo /proc/1/cmdline || exit 0; \
    python -c "import urllib.request as web; web.urlopen('http://127.0.0.1:7860/', timeout=4)"
CMD ["ast-demo", "--host", "0.0.0.0", "--port", "7860"]
