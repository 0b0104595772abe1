"""The page's HTML, CSS and JavaScript. It loads nothing else; its style is that of the run report."""

from jinja2 import Environment

from trinity.io.json_files import to_json
from trinity.merging.recipe import DTYPES
from trinity.reporting.merge_server.form import methods_for_page
from trinity.reporting.template import STYLE

OVERWRITE_LABEL = "Replace an earlier merge or export in this folder"


def render(token: str, folder: str) -> str:
    """The page.

    Args:
        token: of this start, for the page's requests.
        folder: in which merges run, to which paths are relative.
    """
    data = to_json({"token": token, "methods": methods_for_page()}).replace("<", "\\u003c")
    page = Environment(autoescape=True).from_string(PAGE)
    return page.render(
        style=STYLE + FORM_STYLE, script=SCRIPT, data=data, folder=folder, dtypes=DTYPES, overwrite=OVERWRITE_LABEL
    )


PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta name=color-scheme content="light dark">
<title>Merge models</title>
<link rel=icon href="data:,">
<style>{{ style|safe }}</style>
</head>
<body>
<main>
<h1>Merge models</h1>
<p class=note>Paths are relative to <code>{{ folder }}</code>. A model is a Hugging Face folder, a run directory
(its newest checkpoint), or RUN_DIR@step.</p>
<noscript><p>This page needs JavaScript.</p></noscript>
<form id=form autocomplete=off>
<fieldset>
<legend>Recipe</legend>
<div class=choices>
<label><input type=radio name=by value=form checked> Fill in a form</label>
<label><input type=radio name=by value=yaml> Write YAML</label>
</div>
<div id=by-form>
<div class=field>
<label for=method>Method</label>
<select id=method aria-describedby=summary></select>
<p class=note id=summary></p>
<details>
<summary>Symbols</summary>
<p class=note>W_i are the models' tensors, w_i their weights, B the base's, δ_i = W_i - B, λ is lambda, d density, n the
number of a tensor's entries. A parameter may also be a list, a gradient over the layers ([0, 0.5, 1]), or values by
tensor ([{filter: mlp, value: 0.3}, {value: 0.5}]).</p>
</details>
</div>
<div class=field>
<label for=base_model id=base-label>Base model</label>
<input id=base_model spellcheck=false>
</div>
<div id=models></div>
<p><button type=button id=add>Add a model</button></p>
<div id=whole class=grid></div>
<details>
<summary>Output type, tokenizer, permuted experts</summary>
<div class=grid>
<div class=field>
<label for=out_dtype>Type of the matrices</label>
<select id=out_dtype>
<option value="">as the base or first model</option>
{% for dtype in dtypes %}<option>{{ dtype }}</option>{% endfor %}
</select>
</div>
<div class=field>
<label for=tokenizer>Tokenizer: base, union, or a model</label>
<input id=tokenizer spellcheck=false placeholder="all models have the same">
</div>
</div>
<p><label><input type=checkbox id=match_experts> Bring permuted experts into one order first (match_experts)</label></p>
</details>
</div>
<div id=by-yaml class=field hidden>
<label for=yaml>Recipe in YAML</label>
<textarea id=yaml rows=16 spellcheck=false></textarea>
</div>
</fieldset>
<fieldset>
<legend>Output</legend>
<div class=grid>
<div class=field>
<label for=out_dir>Folder to make</label>
<input id=out_dir spellcheck=false placeholder="required, such as out/merged">
</div>
<div class=field>
<label for=workers>Threads</label>
<input id=workers inputmode=numeric placeholder="1">
</div>
</div>
<p><label><input type=checkbox id=overwrite> {{ overwrite }}</label></p>
</fieldset>
<fieldset>
<legend>After the merge</legend>
<div class=field>
<label for=report>Report to write, an HTML file</label>
<input id=report spellcheck=false placeholder="none">
</div>
<details>
<summary>Evaluate and recalibrate on texts</summary>
<div class=field>
<label for=validation>Texts on which all models are evaluated for the report, one NAME=TEXT a line</label>
<textarea id=validation rows=2 spellcheck=false placeholder="none"></textarea>
</div>
<div class=field>
<label for=recalibrate>Texts on which the expert biases are balanced, one a line</label>
<textarea id=recalibrate rows=2 spellcheck=false placeholder="none"></textarea>
</div>
<div class=grid>
<div class=field>
<label for=window>Tokens of a row</label>
<input id=window inputmode=numeric placeholder="2048, or the model's positions if fewer">
</div>
<div class=field>
<label for=rows>Most rows of a text</label>
<input id=rows inputmode=numeric placeholder="all, and 32 to recalibrate">
</div>
</div>
</details>
</fieldset>
<p class=actions>
<button type=submit id=check>Check</button>
<button type=button id=merge>Merge</button>
</p>
<p id=refused role=alert hidden></p>
</form>
<section id=checked hidden aria-live=polite>
<h2>Check</h2>
<pre id=plan></pre>
<details><summary>Recipe in YAML</summary><pre id=recipe></pre><button type=button id=edit>Edit it</button></details>
</section>
<section id=running hidden>
<h2 id=state aria-live=polite></h2>
<p class=note>The same merge on the command line; to replace the folder that it made, add --overwrite:</p>
<pre id=command></pre>
<progress id=progress max=100 aria-label="Progress of the current step"></progress>
<pre id=bar></pre>
<pre id=lines aria-live=polite></pre>
<p class=actions>
<button type=button id=cancel>Cancel the merge</button>
<a id=report-link target=_blank hidden>Open the report</a>
</p>
</section>
</main>
<script type="application/json" id=data>{{ data|safe }}</script>
<script>{{ script|safe }}</script>
</body>
</html>
"""

FORM_STYLE = """
fieldset { border: 1px solid var(--line); border-radius: 0.3rem; margin: 1rem 0; padding: 0.5rem 1rem 1rem; }
fieldset { min-width: 0; }
fieldset fieldset { padding-top: 0.25rem; }
legend { padding: 0 0.4rem; font-weight: 600; }
fieldset fieldset legend { font-weight: normal; }
label { overflow-wrap: anywhere; }
.choices { display: flex; flex-wrap: wrap; gap: 0.25rem 1.5rem; margin-bottom: 0.5rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(16rem, 100%), 1fr)); gap: 0 1rem; }
.field { margin: 0.5rem 0; }
.field > label { display: block; }
.field input, .field select, .field textarea {
  font: inherit; color: inherit; background: var(--back); border: 1px solid var(--quiet); border-radius: 0.3rem;
  padding: 0.35rem 0.5rem; width: 100%; box-sizing: border-box;
}
.field textarea, pre, code { font-family: ui-monospace, monospace; font-size: 0.9rem; }
::placeholder { color: var(--quiet); opacity: 1; }
button {
  font: inherit; color: inherit; background: none; border: 1px solid var(--quiet); border-radius: 0.3rem;
  padding: 0.4rem 1rem; cursor: pointer;
}
button:disabled { opacity: 0.5; cursor: default; }
#merge { background: var(--text); color: var(--back); border-color: var(--text); }
.actions { display: flex; flex-wrap: wrap; gap: 0.75rem 1rem; align-items: center; }
.model { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: end; }
.model .field { flex: 1 1 8rem; }
.model .wide-field { flex: 3 1 16rem; }
.model button { margin: 0.5rem 0; }
#refused { border-left: 0.25rem solid #c0392b; padding: 0.25rem 0.75rem; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.5rem 0; }
pre:empty { display: none; }
progress { width: 100%; height: 1rem; }
a { color: inherit; }
[hidden] { display: none !important; }
"""

SCRIPT = """
"use strict";
const { token, methods } = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const make = (tag, settings = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), settings);
  element.append(...children);
  return element;
};
const TEXTS = ["base_model", "tokenizer", "out_dtype", "yaml", "out_dir", "workers", "report", "validation",
  "recalibrate", "window", "rows"];
const SWITCHES = ["match_experts", "overwrite"];
const chosen = () => methods.find(method => method.name === at("method").value);

// a parameter's field, with its default where it is empty
const parameterField = (parameter, id) => {
  const missing = parameter.default === null ? "required" : `default ${parameter.default}`;
  const label = make("label", { htmlFor: id }, parameter.name);
  if (parameter.hint) label.append(make("span", { className: "note" }, `, ${parameter.hint}`));
  let input;
  if (parameter.kind === "choice") {
    input = make("select", {}, make("option", { value: "" }, missing),
      ...parameter.words.map(word => make("option", {}, word)));
  } else {
    input = make("input", { placeholder: missing, spellcheck: false });
  }
  Object.assign(input, { id });
  input.dataset.parameter = parameter.name;
  return make("div", { className: "field" }, label, input);
};
const values = place => Object.fromEntries(
  [...place.querySelectorAll("[data-parameter]")].map(input => [input.dataset.parameter, input.value]));

const readModels = () => [...at("models").children].map(row => ({
  model: row.querySelector(".model-name").value, parameters: values(row),
}));
// the rows of the models, with what was typed for parameters that the method also has
const drawModels = models => {
  at("models").replaceChildren(...models.map((model, number) => {
    const name = make("input", { id: `model-${number}`, className: "model-name", value: model.model });
    name.spellcheck = false;
    const row = make("div", { className: "model" },
      make("div", { className: "field wide-field" }, make("label", { htmlFor: name.id }, "Folder or run"), name),
      ...chosen().per_model.map(parameter => {
        const field = parameterField(parameter, `model-${number}-${parameter.name}`);
        field.lastChild.value = model.parameters[parameter.name] || "";
        return field;
      }));
    if (models.length > 1) {
      const remove = make("button", { type: "button", ariaLabel: `Remove model ${number + 1}` }, "Remove");
      remove.onclick = () => {
        drawModels(readModels().filter((_, other) => other !== number));
        at("add").focus();
      };
      row.append(remove);
    }
    return make("fieldset", {}, make("legend", {}, `Model ${number + 1}`), row);
  }));
};
const drawMethod = typed => {
  const { base, least, most, summary, whole } = chosen();
  const count = most === null ? `at least ${least}` : `${least}`;
  at("summary").textContent = `${summary} Merges ${count} model${count === "1" || count === "at least 1" ? "" : "s"}` +
    `${base === "yes" ? " besides the base" : ""}.`;
  at("base-label").textContent = "Base model" + {
    yes: " (required)", may: " (optional)", no: " (optional, gives only config and tokenizer)",
  }[base];
  at("whole").replaceChildren(...whole.map(parameter => parameterField(parameter, `parameter-${parameter.name}`)));
  for (const input of at("whole").querySelectorAll("[data-parameter]")) {
    input.value = typed[input.dataset.parameter] || "";
  }
};
const by = () => document.querySelector("[name=by]:checked").value;
const drawBy = () => {
  at("by-form").hidden = by() !== "form";
  at("by-yaml").hidden = by() !== "yaml";
};
const readForm = () => ({
  by: by(), method: at("method").value, models: readModels(), parameters: values(at("whole")),
  ...Object.fromEntries(TEXTS.map(id => [id, at(id).value])),
  ...Object.fromEntries(SWITCHES.map(id => [id, at(id).checked])),
});
const fillForm = form => {
  document.querySelector(`[name=by][value=${form.by === "yaml" ? "yaml" : "form"}]`).checked = true;
  at("method").value = form.method;
  for (const id of TEXTS) at(id).value = form[id] || "";
  for (const id of SWITCHES) at(id).checked = form[id] === true;
  drawBy();
  drawMethod(form.parameters);
  drawModels(form.models);
};

const refuse = sentence => {
  at("refused").hidden = !sentence;
  at("refused").textContent = sentence;
};
const ask = async (address, body) => {
  let answer;
  try {
    const response = await fetch(address, body === undefined ? { headers: { "X-Token": token } } : {
      method: "POST", headers: { "X-Token": token, "Content-Type": "application/json" }, body: JSON.stringify(body),
    });
    answer = await response.json();
  } catch (error) {
    answer = { error: "the server does not answer; start tools/merge.py --serve again and open the printed URL" };
  }
  return answer;
};
const check = async () => {
  refuse("");
  at("checked").hidden = true;
  at("check").disabled = true;
  const answer = await ask("check", readForm());
  at("check").disabled = false;
  if (answer.error) return refuse(answer.error);
  at("plan").textContent = answer.plan;
  at("recipe").textContent = answer.recipe;
  at("checked").hidden = false;
};

const TITLES = { running: "Merging", finished: "Merged", cancelled: "Cancelled", failed: "Failed" };
const set = (id, text) => { if (at(id).textContent !== text) at(id).textContent = text; };
let timer = 0;
const show = status => {
  clearTimeout(timer);
  if (status.error) {
    refuse(status.error);
    return;
  }
  const runs = status.state === "running";
  at("running").hidden = status.state === "idle";
  at("merge").disabled = runs;
  if (status.state === "idle") return;
  set("state", TITLES[status.state]);
  set("command", status.command);
  const again = status.state === "cancelled" ? "\\nFinished files are kept: the same merge continues there." : "";
  set("lines", status.lines.join("\\n") + again);
  set("bar", runs ? status.bar || `${status.seconds} s since the start` : "");
  at("progress").hidden = at("cancel").hidden = !runs;
  if (status.percent === null) at("progress").removeAttribute("value");
  else at("progress").value = status.percent;
  at("report-link").hidden = !(status.state === "finished" && status.report);
  if (runs) timer = setTimeout(async () => show(await ask("status")), 500);
};
const merge = async () => {
  refuse("");
  at("merge").disabled = true;
  const answer = await ask("merge", readForm());
  at("merge").disabled = false;
  if (answer.error) refuse(answer.error);
  else show(answer);
  if (!answer.error) at("running").scrollIntoView({ block: "nearest" });
};

at("method").append(...methods.map(method => make("option", {}, method.name)));
at("method").onchange = () => {
  const typed = values(at("whole"));
  drawMethod(typed);
  drawModels(readModels());
};
document.querySelectorAll("[name=by]").forEach(choice => { choice.onchange = drawBy; });
at("add").onclick = () => {
  drawModels([...readModels(), { model: "", parameters: {} }]);
  at(`model-${at("models").children.length - 1}`).focus();
};
at("edit").onclick = () => {
  at("yaml").value = at("recipe").textContent;
  document.querySelector("[name=by][value=yaml]").checked = true;
  drawBy();
  at("yaml").focus();
};
at("form").onsubmit = event => { event.preventDefault(); check(); };
at("merge").onclick = merge;
at("cancel").onclick = async () => show(await ask("cancel", {}));
at("report-link").href = `report?token=${encodeURIComponent(token)}`;
const empty = { model: "", parameters: {} };
fillForm({ by: "form", method: "linear", models: [empty, empty], parameters: {} });
ask("status").then(status => {
  if (status.form) fillForm(status.form);
  show(status);
});
"""
