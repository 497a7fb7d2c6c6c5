//! A model's own chat template: messages in, the text of the prompt out.
//!
//! Templates are Jinja as Hugging Face runs them (`trim_blocks`, `lstrip_blocks`, Python's string methods,
//! `raise_exception`); minijinja is the engine. A template comes with the model and is not trusted: its
//! work is bounded by fuel.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, context};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Instructions one rendering may take. A long conversation needs some thousands.
const MAX_FUEL: u64 = 1_000_000;
const NAME: &str = "chat_template";
/// Between the messages, for models that were not taught a conversation.
const BREAK: &str = "\n\n";

/// How messages become a prompt.
#[derive(Debug)]
pub enum ChatTemplate {
    /// One after the other.
    Plain,
    Compiled {
        environment: Box<Environment<'static>>,
        bos_token: String,
        eos_token: String,
    },
}

impl ChatTemplate {
    /// Compiles `source`; the tokens are what the template may print as `bos_token` and `eos_token`.
    pub fn new(source: String, bos_token: String, eos_token: String) -> Result<Self, Error> {
        let mut environment = jinja();
        environment.set_fuel(Some(MAX_FUEL));
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(NAME, source)?;
        Ok(Self::Compiled { environment: Box::new(environment), bos_token, eos_token })
    }

    /// For a model that comes without a template: the text itself, which the model continues.
    pub fn plain() -> Self {
        Self::Plain
    }

    /// The prompt for one user message, ending where the assistant's answer begins.
    pub fn render(&self, system: Option<&str>, user: &str) -> Result<String, Error> {
        let Self::Compiled { environment, bos_token, eos_token } = self else {
            return Ok(system.map_or_else(|| user.to_owned(), |system| [system, user].join(BREAK)));
        };
        let mut messages = Vec::new();
        if let Some(system) = system {
            messages.push(context! { role => "system", content => system });
        }
        messages.push(context! { role => "user", content => user });
        environment.get_template(NAME)?.render(context! {
            messages,
            add_generation_prompt => true,
            bos_token => bos_token.as_str(),
            eos_token => eos_token.as_str(),
        })
    }
}

/// Jinja with the settings of Hugging Face's chat templates; prompts use the same.
pub(crate) fn jinja() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("Jinja's own delimiters"));
    environment.set_unknown_method_callback(unknown_method_callback);
    environment
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
        {{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' \
        + message['content'].strip() + '<|im_end|>' + '\n'}}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source.to_owned(), "<s>".to_owned(), "</s>".to_owned()).unwrap()
    }

    #[test]
    fn renders_chatml_with_and_without_a_system_message() {
        let chat = template(CHATML);
        assert_eq!(
            chat.render(Some("You edit."), " Hi ").unwrap(),
            "<|im_start|>system\nYou edit.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
        assert!(chat.render(None, "Hi").unwrap().starts_with("<|im_start|>system\nBe kind.<|im_end|>"));
    }

    #[test]
    fn without_a_template_the_text_stands_alone() {
        let chat = ChatTemplate::plain();
        assert_eq!(chat.render(None, "Once <b>upon").unwrap(), "Once <b>upon");
        assert_eq!(chat.render(Some("A tale."), "Once").unwrap(), "A tale.\n\nOnce");
    }

    #[test]
    fn a_template_can_refuse_and_cannot_run_forever() {
        let refuses = template("{{ raise_exception('no system message') }}").render(None, "Hi").unwrap_err();
        assert!(refuses.to_string().contains("no system message"), "{refuses}");
        let endless = "{% for i in range(9999) %}{% for j in range(9999) %}{{ j }}{% endfor %}{% endfor %}";
        assert_eq!(template(endless).render(None, "Hi").unwrap_err().kind(), ErrorKind::OutOfFuel);
    }
}
