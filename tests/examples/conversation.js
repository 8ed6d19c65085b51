// Holds a conversation about a picture with the client of examples/node and prints the answers as JSON.
//
//     node conversation.js ADDRESS PICTURE PROTO_FOLDER|reflection
//
// The contract comes from the .proto files in PROTO_FOLDER, or from the service itself.

import { readFile } from "node:fs/promises";
import { credentials, loadPackageDefinition, status } from "@grpc/grpc-js";
import { fromJSON, loadFileDescriptorSetFromBuffer } from "@grpc/proto-loader";
import { LOADED, ask, call, connect, contractIn } from "./vflow.js";

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

/** Says a turn; the text of its deltas, and its last event. */
async function turn(client, session, question, options) {
  const pieces = ask(client, session, question, options);
  let deltas = "";
  for (;;) {
    const { value, done } = await pieces.next();
    if (done) return { deltas, finished: value };
    deltas += value;
  }
}

const client = connect(address, source === "reflection" ? await reflected() : await contractIn(source));
const { name } = await call(client, "CreateSession", { session: { strategy: "strategies/preset-25" } });
const shown = await call(client, "AddImage", { session: name, image: { data: await readFile(picture) } });
const turns = [];
const short = { max_new_tokens: 8, min_new_tokens: 8 };
for (const question of ["What is this?", "Why?"]) turns.push(await turn(client, name, question, short));
const long = ask(client, name, "And then?", { max_new_tokens: 4000, min_new_tokens: 4000 });
await long.next();
await long.return(); // cancels the turn
const state = await call(client, "GetSession", { name });
await call(client, "DeleteSession", { name });
const refusal = await call(client, "GetSession", { name }).catch((error) => error);
client.close();
console.log(
  JSON.stringify({
    receipt: shown.receipt,
    turns,
    state,
    refused: { code: status[refusal.code], details: refusal.metadata.get("grpc-status-details-bin")[0].toString() },
  }),
);
