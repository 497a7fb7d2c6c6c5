//! A pipeline over TLS with a SCRAM login, against the real broker: the options pass through to every client.

use tidemill_connectors::kafka::tools::Record;
use tidemill_tests::Pipeline;
use tidemill_tests::kafka::Broker;

#[test]
fn tls_and_a_login_pass_through() {
    let broker = Broker::start_secure();
    for topic in ["secret-in", "secret-out", "secret-errors"] {
        broker.create_topic(topic, 2);
    }
    let record =
        |id: usize| Record::new(&id.to_string(), format!("{{\"id\": {id}, \"text\": \"news {id}\"}}"));
    broker.produce("secret-in", (0..100).map(record));
    let (address, certificate) = broker.secure();
    let mut pipeline = Pipeline::new(&format!(
        "name: secret\nmodel: {{ name: fake }}\nsource:\n  kafka:\n    brokers: {address}\n    topics: [secret-in]\n    \
         options: &login\n      security.protocol: sasl_ssl\n      sasl.mechanisms: SCRAM-SHA-512\n      \
         sasl.username: tidemill\n      sasl.password: ${{PASSWORD}}\n      ssl.ca.location: {}\n\
         steps:\n  - generate: {{ name: answer, prompt: '{{{{ text }}}}', max_tokens: 8 }}\n\
         sink: {{ kafka: {{ topic: secret-out }} }}\nerrors: {{ kafka: {{ topic: secret-errors }} }}\n",
        certificate.display()
    ));
    pipeline.env = vec![("PASSWORD", "wrong".to_owned())];
    let refused = pipeline.run(&["run", "--quiet", "--until-end"]).expect_code(1).stderr();
    assert!(refused.contains("invalid credentials"), "{refused}");
    assert!(broker.read("secret-out").is_empty());
    pipeline.env = vec![("PASSWORD", "secret".to_owned())];
    pipeline.run(&["run", "--quiet", "--until-end"]).expect_code(0);
    assert_eq!(broker.read("secret-out").len(), 100);
}
