// The handler that the whole way is compared with: Express verifies with the svix package, and upserts the user
// over a pool of 10 connections before it answers.
import express from "express";
import pg from "pg";
import { Webhook } from "svix";

const { PORT, DATABASE_URL, CLERK_WEBHOOK_SIGNING_SECRET } = process.env;
const pool = new pg.Pool({ connectionString: DATABASE_URL, max: 10 });
const webhook = new Webhook(CLERK_WEBHOOK_SIGNING_SECRET);
const app = express();

const UPSERT = `
  INSERT INTO users (clerk_id, email, name, created_at) VALUES ($1, $2, $3, to_timestamp($4 / 1000.0))
  ON CONFLICT (clerk_id) DO UPDATE SET email = excluded.email, name = excluded.name`;
const SIGNED_IN = "UPDATE users SET last_login_at = to_timestamp($2 / 1000.0) WHERE clerk_id = $1";
const DELETE = "DELETE FROM users WHERE clerk_id = $1";

async function apply({ type, data }) {
  if (type === "user.deleted") {
    await pool.query(DELETE, [data.id]);
  } else if (type.startsWith("session.")) {
    await pool.query(SIGNED_IN, [data.user_id, data.created_at]);
  } else {
    const primary = data.email_addresses.find(({ id }) => id === data.primary_email_address_id);
    const name = [data.first_name, data.last_name].filter(Boolean).join(" ") || "Unnamed user";
    const address = primary?.email_address ?? `${data.id}@placeholder.invalid`;
    await pool.query(UPSERT, [data.id, address, name, data.created_at]);
  }
}

app.post("/webhooks/clerk", express.raw({ type: () => true, limit: "1mb" }), async (request, response) => {
  let event;
  try {
    event = webhook.verify(request.body, request.headers);
  } catch {
    return response.status(400).end();
  }
  try {
    await apply(event);
    return response.status(200).end();
  } catch {
    return response.status(500).end();
  }
});

app.listen(Number(PORT), "127.0.0.1");
