// Shows the service a picture and asks about it.
//
//     node chat.js ADDRESS PICTURE QUESTION...

import { readFile } from "node:fs/promises";
import { ask, call, connect, contractIn } from "./vflow.js";

const [address, picture, ...questions] = process.argv.slice(2);
// The .proto files of this repository, or a copy of their folder.
const folder = process.env.VFLOW_PROTO ?? new URL("../../proto", import.meta.url).pathname;
const client = connect(address, await contractIn(folder));
const { name } = await call(client, "CreateSession", {});
try {
  const { receipt } = await call(client, "AddImage", { session: name, image: { data: await readFile(picture) } });
  console.log(`${receipt.visual_tokens} visual tokens, kept per stage: ${receipt.kept_tokens.join(", ")}`);
  for (const question of questions) {
    process.stdout.write(`${question} `);
    for await (const piece of ask(client, name, question)) process.stdout.write(piece);
    process.stdout.write("\n");
  }
} finally {
  await call(client, "DeleteSession", { name });
  client.close();
}
