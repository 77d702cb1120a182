// The API's requests and events.

// A body of the parameters: JSON, or a form with the image to edit. Numbers stay the text they were typed as,
// because a seed may be larger than a JavaScript number holds.
export function requestBody(found, image) {
  const fields = { ...found, stream: "true", partial_images: "3", progress: "true" };
  delete fields.of;
  if (image) {
    const form = new FormData();
    for (const [name, value] of Object.entries(fields)) form.set(name, value);
    form.set("image", image.blob, image.name);
    return form;
  }
  const pairs = Object.entries(fields).map(([name, value]) => {
    const literal = name !== "prompt" && /^(true|-?\d+(\.\d+)?([eE][-+]?\d+)?)$/.test(value);
    return `${JSON.stringify(name)}:${literal ? value : JSON.stringify(value)}`;
  });
  return `{${pairs.join(",")}}`;
}

// The seed of an image, as text: what was asked for plus its index, or what the server drew.
export function seedsOf(found, event) {
  return found.seed === undefined ? String(event.seed) : String(BigInt(found.seed) + BigInt(event.index));
}

// Calls the handler of every server-sent event, named by the last part of its type.
export async function readEvents(response, handlers) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const lines = text.slice(0, end).split("\n");
      text = text.slice(end + 2);
      const data = lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (!data) continue;
      const event = JSON.parse(data);
      handlers[event.type.split(".").pop()]?.(event);
    }
  }
}
