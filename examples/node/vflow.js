// A small client of VFlow for Node. It reads the contract from the .proto files: nothing is generated.

import { randomUUID } from "node:crypto";
import path from "node:path";
import { credentials, loadPackageDefinition } from "@grpc/grpc-js";
import { load } from "@grpc/proto-loader";

export const LOADED = { keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };

/** The contract's packages, as proto-loader gives them, from a folder of .proto files. */
export function contractIn(folder) {
  return load("vflow/v1/conversations.proto", { ...LOADED, includeDirs: [path.resolve(folder)] });
}

/** A client of the service `Conversations` at `address`, of a contract. */
export function connect(address, contract) {
  const { Conversations } = loadPackageDefinition(contract).vflow.v1;
  return new Conversations(address, credentials.createInsecure());
}

/** Calls a method that answers once. */
export function call(client, method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

/**
 * Asks in a session; yields the pieces of the answer as they come, and returns its last event: text, usage, receipt.
 * Leaving the loop early cancels the turn. The request id makes it safe to send the same request again.
 */
export async function* ask(client, session, question, options = {}) {
  const request = { session, parts: [{ text: question }], options, request_id: randomUUID() };
  const events = client.Chat(request);
  let finished;
  try {
    for await (const response of events) {
      if (response.event === "delta") yield response.delta.text;
      else finished = response.finished;
    }
  } finally {
    if (!finished) events.cancel();
  }
  return finished;
}
