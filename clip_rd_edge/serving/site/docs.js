// The page of the API: openapi.json as headings, tables and examples.

import { element, request } from "./api.js";

const LABELS = { query: "in the address", path: "in the path" };

function typeOf(schema, schemas) {
  if (schema.$ref) return typeOf(schemas[schema.$ref.split("/").at(-1)], schemas);
  if (schema.anyOf) return schema.anyOf.map((each) => typeOf(each, schemas)).filter((each) => each !== "null").join(" or ");
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" or ");
  if (schema.type === "array") return typeOf(schema.items ?? {}, schemas).split(" or ").map((each) => `list of ${each}`).join(" or ");
  return schema.type ?? "anything";
}

function fieldsOf(operation, schemas) {
  const given = (operation.parameters ?? []).map(({ name, in: place, required, schema }) => [
    name, `${typeOf(schema, schemas)}, ${LABELS[place]}`, required ? "needed" : "",
  ]);
  const reference = operation.requestBody?.content["application/json"].schema.$ref;
  if (!reference) return [given, ""];
  const { properties, required = [], description = "" } = schemas[reference.split("/").at(-1)];
  const fields = Object.entries(properties).map(([name, schema]) => [
    name, typeOf(schema, schemas), required.includes(name) ? "needed" : JSON.stringify(schema.default ?? null),
  ]);
  return [[...given, ...fields], description.split("Attributes:\n")[1] ?? ""];
}

function createTable(fields) {
  const table = element("table", "fields");
  table.createTHead().insertRow().append(...["field", "type", "default"].map((text) => {
    const cell = element("th", "", text);
    cell.scope = "col";
    return cell;
  }));
  const body = table.createTBody();
  for (const [name, ...rest] of fields) {
    const head = element("th", "", element("code", "", name));
    head.scope = "row";
    body.insertRow().append(head, ...rest.map((text) => element("td", "", text === "null" ? "" : text)));
  }
  return table;
}

function createOperation(path, method, operation, schemas) {
  const section = element("section", "operation", element("h2", "", element("code", "", `${method.toUpperCase()} ${path}`)));
  section.append(element("p", "", operation.summary));
  const [fields, description] = fieldsOf(operation, schemas);
  if (fields.length) section.append(createTable(fields));
  if (description) section.append(element("p", "small lines", description.replace(/^ +/gm, "")));
  const forms = Object.keys(operation.requestBody?.content ?? {});
  if (forms.length > 1) section.append(element("p", "small", `Sent as ${forms.join(", ")}.`));
  for (const { source } of operation["x-codeSamples"] ?? []) {
    const sample = element("pre", "", source.replaceAll("URL", location.href.replace(/\/(docs)?[?#]?$/, "")));
    sample.tabIndex = 0; // which scrolls
    section.append(sample);
  }
  return section;
}

async function show() {
  document.getElementById("error").textContent = "";
  try {
    const { info, paths, components } = await (await request("openapi.json", {}, show)).json();
    document.getElementById("version").textContent = `${info.title} ${info.version}`;
    const operations = Object.entries(paths).flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, operation]) => createOperation(path, method, operation, components.schemas)));
    document.getElementById("operations").replaceChildren(...operations);
  } catch (error) {
    document.getElementById("error").textContent = error.message;
  }
}

show();
