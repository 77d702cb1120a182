// The API's description for people, made from openapi.json.
const api = await (await fetch("/openapi.json")).json();
const main = document.getElementById("operations");

function made(tag, text, ...children) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

function resolved(schema) {
  return schema?.$ref ? api.components.schemas[schema.$ref.split("/").pop()] : schema;
}

// Text with its `code` as elements.
function words(text) {
  return text.split("`").map((part, index) => (index % 2 ? made("code", part) : part));
}

// A JavaScript number does not hold what is larger than a safe integer.
function bound(word, value) {
  return value === undefined || Math.abs(value) > Number.MAX_SAFE_INTEGER ? "" : `${word} ${value}`;
}

function kind(schema) {
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.anyOf) return schema.anyOf.map(kind).filter((name) => name !== "null").join(" or ");
  if (schema.type === "array") return `array of ${kind(resolved(schema.items) ?? {})}`;
  const bounds = [bound("from", schema.minimum), bound("above", schema.exclusiveMinimum), bound("to", schema.maximum)];
  return [schema.format === "binary" ? "file" : schema.type ?? "object", ...bounds].filter(Boolean).join(" ");
}

function table(schema, title) {
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) => {
    const usual = field.default === undefined || field.default === null ? "" : ` Left out: ${JSON.stringify(field.default)}.`;
    const cells = [made("td", "", made("code", name)), made("td", kind(field)), made("td", "", ...words((field.description ?? "") + usual))];
    return made("tr", "", ...cells);
  });
  const head = made("thead", "", made("tr", "", made("th", "field"), made("th", "accepted"), made("th", "meaning")));
  const scroll = made("div", "", made("table", "", head, made("tbody", "", ...rows)));
  scroll.className = "scroll";
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", `Fields of ${title}`);
  return scroll;
}

function example(method, path, type, schema) {
  if (type === "multipart/form-data") {
    return `curl ${location.origin}${path} -F image=@image.png -F prompt="make the circle green"`;
  }
  const body = JSON.stringify(schema.examples?.[0] ?? {});
  return `curl ${location.origin}${path} -H "Content-Type: application/json" -d '${body}'`;
}

for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    const article = made("article", "", made("h2", `${method.toUpperCase()} ${path}`), made("p", "", ...words(operation.description)));
    for (const [type, body] of Object.entries(operation.requestBody?.content ?? {})) {
      const schema = resolved(body.schema);
      const code = made("pre", "", made("code", example(method, path, type, schema)));
      code.tabIndex = 0;
      article.append(code, table(schema, `${method.toUpperCase()} ${path}`));
    }
    const answers = Object.entries(operation.responses).map(([status, answer]) => made("li", "", ...words(`${status}: ${answer.description}`)));
    article.append(made("h3", "Answers"), made("ul", "", ...answers));
    main.append(article);
  }
}
