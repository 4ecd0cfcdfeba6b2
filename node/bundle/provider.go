package bundle

import (
	"net/url"
	"slices"
	"strings"

	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/policy"
)

// Provider is an identity provider with what concerns its configuration only.
type Provider struct {
	identity.ProviderConfig
	CAFile string // path in the bundle; "" trusts the system's authorities
	// Shared says that strangers get tokens of this issuer too, so that
	// Require must pin the tenant.
	Shared bool

	path string
	line int
}

// sharedIssuer is a public platform whose issuer serves all its customers.
type sharedIssuer struct {
	name string
	host string
	path func(string) bool // nil: any path
	// tenant are the claims one of which Require must pin; nil: any claim.
	tenant []string
}

// Sources: the platforms' own pages on OpenID Connect tokens. Names that their
// owners can give up and others take (repository_owner) come with an id that
// cannot change hands (repository_owner_id); both are accepted.
var sharedIssuers = []sharedIssuer{
	{"GitHub Actions", "token.actions.githubusercontent.com", nil, []string{"repository_owner_id", "repository_owner", "repository_id", "repository", "enterprise_id"}},
	{"GitLab.com", "gitlab.com", nil, []string{"namespace_id", "namespace_path", "project_id", "project_path"}},
	{"CircleCI", "oidc.circleci.com", nil, nil},
	{"Buildkite", "agent.buildkite.com", nil, []string{"organization_id", "organization_slug", "pipeline_id"}},
	{"Google", "accounts.google.com", nil, []string{"hd", "email", "sub"}},
	{"Bitbucket", "api.bitbucket.org", nil, nil},
	{"HCP Terraform", "app.terraform.io", nil, nil},
	{"Vercel", "oidc.vercel.com", nil, nil},
	{"Microsoft Entra (several tenants)", "login.microsoftonline.com", multiTenant, []string{"tid"}},
}

func multiTenant(path string) bool {
	first, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	return slices.Contains([]string{"common", "organizations", "consumers", "{tenantid}"}, strings.ToLower(first))
}

// genericAudiences are those of other services: a token made for one of them
// must not open ours. A trailing * stands for anything.
var genericAudiences = []string{
	"sts.amazonaws.com", "api://AzureADTokenExchange", "https://iam.googleapis.com/*", "//iam.googleapis.com/*",
	"https://github.com/*", "https://gitlab.com", "https://kubernetes.default.svc*", "kubernetes", "sigstore", "pypi", "testpypi",
	"vault", "default",
}

func (r *reading) provider(f file, o *object) {
	before := len(r.problems)
	p := &Provider{path: f.Path, line: o.node.Line}
	p.Name = o.required("name")
	if p.Name != "" {
		o.what = "identity provider " + p.Name
		if !loginName.MatchString(p.Name) {
			o.bad("name", "%s", loginNameRule)
		} else if p.Name == policy.BootstrapProvider {
			o.bad("name", "%q stands for the certificate that the cluster was made with", p.Name)
		}
	}
	p.Dev = o.bool("dev")
	if p.Dev && !r.dev {
		o.bad("dev", "a provider marked dev is for trials; this node was not started with --dev")
	}
	switch subjects := o.required("subjects"); subjects {
	case "workload":
		p.Kind = policy.Workload
	case "user":
		p.Kind = policy.User
	case "":
	default:
		o.bad("subjects", "%q is not known; want workload (jobs, services) or user (people)", subjects)
	}
	host, known := r.issuer(o, p)
	r.audience(o, p)
	p.SignalAudience = o.text("signalAudience")
	if p.SignalAudience != "" && p.SignalAudience == p.Audience {
		o.bad("signalAudience", "%q is the audience of tokens that let somebody in; give logout tokens and security events another one", p.SignalAudience)
	}
	p.CAFile, p.CA = r.caFile(o, "caFile")
	r.algorithms(o, p)
	p.Groups = o.texts("groups")
	p.GroupsClaim = o.text("groupsClaim")
	for _, in := range o.objects("groupRules") {
		rule := identity.GroupRule{When: in.listMap("when"), Groups: in.texts("groups")}
		if len(rule.When) == 0 {
			in.bad("when", "name at least one claim with the values that it may have; for groups of all subjects write groups on the provider")
		}
		if len(rule.Groups) == 0 {
			in.bad("groups", "list at least one group")
		}
		in.done()
		p.GroupRules = append(p.GroupRules, rule)
	}
	p.Claims = o.texts("claims")
	p.PersonClaims = o.texts("personClaims")
	p.Require = o.listMap("require")
	for _, claim := range sortedKeys(p.Require) {
		for _, v := range p.Require[claim] {
			if strings.Contains(v, "*") {
				o.bad("require", "%s: %q: values are compared exactly, * matches nothing but itself; list the values", claim, v)
			}
		}
	}
	p.Shared = o.bool("shared")
	if known != nil {
		if o.has("shared") && !p.Shared {
			o.bad("shared", "%s issues tokens for everybody at %s; leave the field out", known.name, host)
		}
		p.Shared = true
	}
	if p.Shared {
		r.tenant(o, p, known)
	}
	o.done()
	if len(r.problems) == before {
		// What the verifier would refuse must not get as far as that.
		if err := p.Validate(); err != nil {
			o.report(o.node.Line, "%s", err)
		}
	}
	if first := r.providers[p.Name]; first != nil {
		o.bad("name", "there is another identity provider of this name at %s:%d", first.path, first.line)
		return
	}
	if p.Name != "" {
		r.providers[p.Name] = p
	}
}

// issuer reads and judges the issuer, and says whether it is a public platform.
func (r *reading) issuer(o *object, p *Provider) (host string, known *sharedIssuer) {
	p.Issuer = o.required("issuer")
	if p.Issuer == "" {
		return "", nil
	}
	u, err := url.Parse(p.Issuer)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.Contains(p.Issuer, "#") {
		o.bad("issuer", "%q is not the URL of an issuer: want https://host/path, without user, query and fragment", p.Issuer)
		return "", nil
	}
	if u.Scheme != "https" {
		o.bad("issuer", "%q: want https; keys that come over %s can be anybody's", p.Issuer, u.Scheme)
	}
	host = strings.TrimSuffix(strings.ToLower(u.Hostname()), ".")
	for i := range sharedIssuers {
		s := &sharedIssuers[i]
		if host == s.host && (s.path == nil || s.path(u.Path)) {
			return host, s
		}
	}
	return host, nil
}

func (r *reading) audience(o *object, p *Provider) {
	p.Audience = o.required("audience")
	if p.Audience == "" {
		return
	}
	if strings.TrimSuffix(p.Audience, "/") == strings.TrimSuffix(p.Issuer, "/") {
		o.bad("audience", "the issuer's own URL is what its tokens have by default, for whomever; use one that only this cluster accepts, such as https://sallyport.example.com")
		return
	}
	for _, g := range genericAudiences {
		prefix, wild := strings.CutSuffix(g, "*")
		if p.Audience == g || wild && strings.HasPrefix(p.Audience, prefix) {
			o.bad("audience", "%q is the audience of another service: whoever gets a token there could use it here; use one that only this cluster accepts, such as https://sallyport.example.com", p.Audience)
			return
		}
	}
}

func (r *reading) algorithms(o *object, p *Provider) {
	p.Algorithms = o.texts("algorithms")
	if p.Algorithms == nil {
		p.Algorithms = slices.Clone(identity.DefaultAlgorithms)
	}
	if len(p.Algorithms) == 0 {
		o.bad("algorithms", "list at least one, or leave the field out for RS256 and ES256")
	}
	for _, a := range p.Algorithms {
		if !slices.Contains(algorithms, a) {
			o.bad("algorithms", "%q cannot be used; choose from %s", a, strings.Join(algorithms, ", "))
		}
	}
}

// algorithms are those with a public key. "none" and HS* are not among them:
// whoever can check such a token can make it.
var algorithms = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}

// tenant refuses a shared issuer that does not say whose tokens are meant.
func (r *reading) tenant(o *object, p *Provider, known *sharedIssuer) {
	var want []string
	who := "this issuer is shared"
	if known != nil {
		want = known.tenant
		who = known.name + " issues tokens for everybody"
	}
	if want == nil {
		if len(p.Require) == 0 {
			o.bad("require", "%s: name the claim that tells your tenant, with its values; without it, strangers' jobs would be let in", who)
		}
		return
	}
	if !slices.ContainsFunc(want, func(c string) bool { return len(p.Require[c]) > 0 }) {
		o.bad("require", "%s: pin your tenant with one of the claims %s; without it, strangers' jobs would be let in", who, strings.Join(want, ", "))
	}
}
