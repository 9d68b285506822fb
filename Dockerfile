# One image for every service of docker-compose.yml that is ours: code server, webserver, daemon, MLflow, Spark master and workers.
FROM python:3.12.12-slim-bookworm

RUN groupadd --gid 10001 app && useradd --uid 10001 --gid app --create-home app \
    && mkdir -p /app /data /artifacts /dagster && chown app:app /app /data /artifacts /dagster
WORKDIR /app

# LightGBM needs OpenMP; Java comes with the Python packages.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*

COPY requirements.lock ./
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock

COPY --chown=app:app . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .

USER app
ENV DAGSTER_HOME=/dagster MLFLOW_DISABLE_TELEMETRY=true PYTHONUNBUFFERED=1
COPY --chown=app:app dagster.cluster.yaml /dagster/dagster.yaml
