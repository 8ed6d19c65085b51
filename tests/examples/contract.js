// Loads every file of the contract and prints the methods of its services as JSON.
//
//     node contract.js PROTO_FOLDER

import { readdir } from "node:fs/promises";
import path from "node:path";
import { load } from "@grpc/proto-loader";

const folder = path.resolve(process.argv[2]);
const files = (await readdir(path.join(folder, "vflow/v1"))).map((file) => `vflow/v1/${file}`);
const definition = await load(files, { includeDirs: [folder] });
const services = Object.entries(definition).filter(([, { format }]) => format === undefined);
console.log(JSON.stringify(Object.fromEntries(services.map(([name, methods]) => [name, Object.keys(methods)]))));
