"""MLflow's own page, in Chromium, answers which run was best: its format of saved views is nowhere described."""

import shutil
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from minitron.config.parse import parse
from minitron.tracking.client import annotate_run, connect
from minitron.tracking.pipeline_run import PARENT_TAG, STAGE_TAG, VERDICT_TAG, join_pipeline_run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium to look at MLflow with: apt-get install chromium chromium-driver"
)

NAMES = """
const links = [...document.querySelectorAll("a[href*='/runs/']")].filter(link => /^\\d{4}-|·/.test(link.textContent));
const top = part => part.getBoundingClientRect().top;
return links.sort((a, b) => top(a) - top(b)).map(link => link.textContent);"""


def test_the_saved_view_lists_the_pipeline_runs_the_best_first(mlflow_server: str, tmp_path: Path) -> None:
    client = connect(mlflow_server)
    for model, loss in (("good", 3.0), ("best", 2.0), ("bad", 4.0)):
        values = {"output": tmp_path, "corpus": "c", "teacher": "t", "tracking_uri": mlflow_server}
        config = parse("prepare", values | {"experiment": tmp_path.name, "pipeline_run_id": model})
        run = join_pipeline_run(client, config, model)
        assert run is not None
        metrics = {"student_validation_loss": loss}
        annotate_run(client, run.info.run_id, {VERDICT_TAG: f"verdict on {model}"}, metrics)
        tags = {PARENT_TAG: run.info.run_id, STAGE_TAG: "evaluate"}
        stage = client.create_run(run.info.experiment_id, tags=tags, run_name=f"evaluate · {run.info.run_name}")
        annotate_run(client, stage.info.run_id, {}, metrics)
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1920,1000"):
        options.add_argument(argument)
    with webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER))) as page:
        page.get(f"{mlflow_server}/#/experiments/{run.info.experiment_id}/runs?viewStateShareKey=best")
        WebDriverWait(page, 60).until(lambda page: "verdict on best" in page.page_source)
        names = page.execute_script(NAMES)
    assert [name.split()[-1] for name in names] == ["best", "good", "bad"]
