// Holds a conversation about a picture and prints what it heard as JSON.
//
//     node conversation.js ADDRESS PICTURE PROTO_FOLDER|reflection
//
// The contract comes from the .proto files in PROTO_FOLDER, or from the service itself.

import { readFile } from "node:fs/promises";
import path from "node:path";
import { credentials, loadPackageDefinition, status } from "@grpc/grpc-js";
import { fromJSON, load, loadFileDescriptorSetFromBuffer } from "@grpc/proto-loader";

const LOADED = { keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };

/** What a client must know beforehand to ask a service for its contract (grpc.reflection.v1alpha). */
const REFLECTION = {
  nested: { grpc: { nested: { reflection: { nested: { v1alpha: { nested: {
    ServerReflection: {
      methods: {
        ServerReflectionInfo: {
          requestType: "ServerReflectionRequest", requestStream: true,
          responseType: "ServerReflectionResponse", responseStream: true,
        },
      },
    },
    ServerReflectionRequest: {
      fields: { file_by_filename: { type: "string", id: 3 }, file_containing_symbol: { type: "string", id: 4 } },
    },
    ServerReflectionResponse: { fields: { file_descriptor_response: { type: "FileDescriptorResponse", id: 4 } } },
    FileDescriptorResponse: { fields: { file_descriptor_proto: { rule: "repeated", type: "bytes", id: 1 } } },
  } } } } } } },
};

const [address, picture, source] = process.argv.slice(2);

/** The contract as the service itself tells it. */
async function reflected() {
  const { ServerReflection } = loadPackageDefinition(fromJSON(REFLECTION, LOADED)).grpc.reflection.v1alpha;
  const asking = new ServerReflection(address, credentials.createInsecure()).ServerReflectionInfo();
  const files = await new Promise((resolve, reject) => {
    asking.on("error", reject);
    asking.on("data", (response) => resolve(response.file_descriptor_response.file_descriptor_proto));
    asking.write({ file_containing_symbol: "vflow.v1.Conversations" });
  });
  asking.end();
  // Put together to a FileDescriptorSet: field 1, repeated.
  const set = files.flatMap((file) => [Buffer.from([0x0a, ...varint(file.length)]), file]);
  return loadFileDescriptorSetFromBuffer(Buffer.concat(set), LOADED);
}

function varint(number) {
  return number < 0x80 ? [number] : [(number & 0x7f) | 0x80, ...varint(number >>> 7)];
}

/** A method that answers once, as a promise. */
function unary(client, method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

/** Says a turn; the text of its deltas, and its last event. */
async function ask(client, session, parts) {
  let deltas = "";
  let finished;
  const request = { session, parts, options: { max_new_tokens: 8, min_new_tokens: 8 } };
  for await (const response of client.Chat(request)) {
    if (response.event === "delta") deltas += response.delta.text;
    else finished = response.finished;
  }
  return { deltas, finished };
}

const definition =
  source === "reflection"
    ? await reflected()
    : await load("vflow/v1/conversations.proto", { ...LOADED, includeDirs: [path.resolve(source)] });
const { Conversations } = loadPackageDefinition(definition).vflow.v1;
const client = new Conversations(address, credentials.createInsecure());
const { name } = await unary(client, "CreateSession", { session: { strategy: "strategies/preset-25" } });
const shown = await unary(client, "AddImage", { session: name, image: { data: await readFile(picture) } });
const turns = [];
for (const text of ["What is this?", "Why?"]) turns.push(await ask(client, name, [{ text }]));
const state = await unary(client, "GetSession", { name });
await unary(client, "DeleteSession", { name });
const refusal = await unary(client, "GetSession", { name }).catch((error) => error);
client.close();
console.log(
  JSON.stringify({
    receipt: shown.receipt,
    turns,
    state,
    refused: { code: status[refusal.code], details: refusal.metadata.get("grpc-status-details-bin")[0].toString() },
  }),
);
